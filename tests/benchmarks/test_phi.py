"""A search that finds nothing is worth what it would find."""

import base64
import json
from pathlib import Path

import pytest

from benchmarks.phi import REPEATS, files_below, forms, hits, patients, plant, secrets
from fusion.models import train_tokenizer

SECRET = secrets("st-mary")[0]


def found(raw: bytes, secret: str = SECRET, tokenizers: tuple[object, ...] = ()) -> list[str]:
    return hits([("wire", raw)], {secret: forms(secret, tokenizers)})[0]


@pytest.mark.parametrize("before", [b"", b"a", b"ab", b"abc", b"abcd"])
@pytest.mark.parametrize("after", [b"", b"!", b"!?", b"!?."])
def test_it_is_found_in_the_base64_of_whatever_holds_it(before: bytes, after: bytes) -> None:
    assert found(b"..." + base64.b64encode(before + SECRET.encode() + after) + b"...")


@pytest.mark.parametrize(
    "raw",
    [
        SECRET.upper().encode(),
        json.dumps({"error": f"found {SECRET!r}"}).encode(),
        SECRET.encode("utf-16"),
        b"\xff" + SECRET.encode().hex().encode(),
    ],
)
def test_it_is_found_in_other_spellings(raw: bytes) -> None:
    assert found(raw)


@pytest.mark.parametrize("kind", ["<u2", "<i4", "<i8", "text"])
def test_it_is_found_as_token_ids(kind: str) -> None:
    import numpy as np

    tokenizer = train_tokenizer(["Some other text of a few words."], 280)
    ids = tokenizer(f"Seen today: {SECRET}.")["input_ids"]
    raw = json.dumps(ids).encode() if kind == "text" else np.asarray(ids, kind).tobytes()
    assert found(raw, tokenizers=(tokenizer,))


def test_nothing_is_found_where_nothing_is() -> None:
    assert not found(b"Public text about another patient." * 1000)
    assert hits([("a", b"xyz")], {})[1] == 3


def test_patients_are_planted_and_differ_by_hospital(tmp_path: Path) -> None:
    corpus = tmp_path / "private.jsonl"
    corpus.write_text('{"text": "Before."}\n')
    plant(corpus, "st-mary")
    notes = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    assert notes[0] == "Before."
    assert len(notes) == 1 + REPEATS * len(patients("st-mary"))
    needles = {secret: forms(secret) for secret in secrets("st-mary")}
    places, size = hits(files_below(tmp_path), needles)
    assert len(places) == len(needles) == 4 * len(patients("st-mary"))
    assert size == corpus.stat().st_size
    assert not set(secrets("st-mary")) & set(secrets("north"))
