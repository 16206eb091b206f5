"""Texts that quote the corpus or name a person are found, and ordinary ones are left alone."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from participant.corpus import CorpusError
from participant.prompt_checks import (
    PERSONAL,
    RUN,
    corpus_fingerprints,
    fingerprints,
    overlapping,
    personal,
)

PRIVATE = [" ".join(f"word{number * 100 + i}" for i in range(40)) for number in range(20)]
ICD = Path(__file__).parents[1] / "data" / "icd_sample.json"
texts = st.lists(st.sampled_from("ab"), max_size=18)


def corpus(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
    return path


@settings(max_examples=50, deadline=None)
@given(left=texts, right=texts)
def test_two_texts_have_a_fingerprint_in_common_just_when_they_share_a_run(
    left: list[str], right: list[str]
) -> None:
    def runs(words: list[str]) -> set[tuple[str, ...]]:
        return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}

    found = np.unique(fingerprints(" ".join(left)))
    assert len(found) == len(runs(left))
    assert bool(overlapping([" ".join(right)], found)) == bool(runs(left) & runs(right))


def test_case_spaces_and_punctuation_do_not_hide_a_quotation(tmp_path: Path) -> None:
    known = corpus_fingerprints(corpus(tmp_path, PRIVATE), tmp_path / "checks")
    words = PRIVATE[7].split()[5 : 5 + RUN]
    quoted = "It says: " + ",\n\t".join(word.upper() for word in words) + "!"
    short = " ".join(words[:-1])
    across = " ".join(PRIVATE[0].split()[-6:] + PRIVATE[1].split()[:7])
    assert overlapping(["nothing", quoted, short, across, ""], known) == [2]


def test_the_fingerprints_are_made_once_and_anew_for_a_new_corpus(tmp_path: Path) -> None:
    path, folder = corpus(tmp_path, PRIVATE), tmp_path / "checks"
    corpus_fingerprints(path, folder)
    (made,) = folder.iterdir()
    before = made.stat().st_ino
    corpus_fingerprints(path, folder)
    assert made.stat().st_ino == before
    corpus(tmp_path, [*PRIVATE, "x " * 20])
    assert overlapping(["x " * 13], corpus_fingerprints(path, folder)) == [1]
    assert len(list(folder.iterdir())) == 1


def test_a_corpus_without_a_run_of_words_overlaps_with_nothing(tmp_path: Path) -> None:
    known = corpus_fingerprints(corpus(tmp_path, ["short"]), tmp_path / "checks")
    assert overlapping(["short", "x " * 30], known) == []


def test_a_corpus_that_cannot_be_read_passes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("no json\n")
    with pytest.raises(CorpusError):
        corpus_fingerprints(path, tmp_path / "checks")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("date of birth", "Mr Smith, DOB: 12/03/1957, was seen"),
        ("date of birth", "a woman born on 1 March 1957 in Leeds"),
        ("date of birth", "Date of birth 1957-03-12."),
        ("e-mail address", "write to jane.doe+ward@st-mary.example.org."),
        ("telephone number", "call +44 20 7946 0018 after six"),
        ("telephone number", "phone (020) 7946 0018"),
        ("telephone number", "555-867-5309"),
        ("social security number", "his SSN is 219-09-9999"),
        ("NHS number", "943 476 5919"),
        ("record number", "MRN 00482913 was admitted"),
        ("record number", "medical record number: AB-4829137"),
        ("record number", "Patient ID #4829137"),
    ],
)
def test_what_names_a_person_is_found(name: str, text: str) -> None:
    assert name in personal(["nothing to see", text])
    assert personal([text])[name] == [1]


@pytest.mark.parametrize(
    "text",
    [
        "Aortic valve stenosis, I35.0, was first described in 1663; see p. 2019-2020.",
        "Blood pressure 120/80 mmHg on 12/03/2020, sodium 135-145 mmol/L, 37.5 degrees.",
        "The trial enrolled 1 234 567 patients in 2019, OR 1.23 (0.98-1.54), p = 0.0312.",
        "943 476 5918",  # the check digit is wrong
        "000-12-3456 and 900-12-3456 are no numbers of anybody",
        "patients born in 1957 were followed for 30 years",
        "doi:10.1000/182, ISBN 978-3-16-148410-0, version 1.2.3",
        "see @handle and the ratio 3:1",
    ],
)
def test_ordinary_medical_text_is_left_alone(text: str) -> None:
    assert personal([text]) == {}


def test_public_descriptions_of_diseases_name_nobody() -> None:
    assert personal([ICD.read_text(encoding="utf-8")]) == {}


@pytest.mark.parametrize("unit", ["1", "1-", "a.", "a@", "+1 ", "(1", "mrn ", "born ", "1 2-", "-"])
def test_no_text_makes_a_pattern_slow(unit: str) -> None:
    """Twice the text takes about twice the time: nothing in the table goes back and forth."""

    def seconds(size: int) -> float:
        start = time.process_time()
        personal([unit * (size // len(unit))])
        return time.process_time() - start

    assert min(seconds(100_000) for _ in range(2)) < 1.5
    assert set(PERSONAL)
