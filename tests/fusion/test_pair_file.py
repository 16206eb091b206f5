"""A file of pairs: what cannot be used is counted and left out, what is held out stays together."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusion.models import train_tokenizer
from fusion.pair_file import (
    ALL,
    PairFile,
    PreferenceError,
    PreferencePair,
    counts,
    read_pairs,
    share_by_domain,
)
from fusion.pair_tokens import readable

TOKENIZER = train_tokenizer(["A valve narrows."] * 3, 260)
GOOD = {"prompt": "A valve", "chosen": " narrows.", "rejected": " sings."}
BAD: list[tuple[bytes | dict[str, Any], str]] = [
    (b"{broken", "no JSON"),
    (b"\xff\xfe", "no JSON"),
    (b"[" * 100_000, "no JSON"),
    (b"[1]", "no prompt, chosen and rejected as texts"),
    ({"prompt": "A valve", "chosen": "x"}, "no prompt, chosen and rejected as texts"),
    ({**GOOD, "chosen": ["x"]}, "no prompt, chosen and rejected as texts"),
    ({**GOOD, "rejected": " \n"}, "an empty answer"),
    ({**GOOD, "rejected": GOOD["chosen"]}, "two answers that are one"),
    ({**GOOD, "chosen": "\ud800"}, "no Unicode text"),
    ({**GOOD, "domain": "/etc"}, "a domain that is no name"),
    ({**GOOD, "domain": 3}, "a domain that is no name"),
    ({**GOOD, "chosen": "x" * 99}, "longer than the pivot can see at once"),
    ({**GOOD, "source": "the same pair"}, "stands there twice"),
]


def write(path: Path, *lines: bytes | dict[str, Any]) -> Path:
    rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(rows) + b"\n")
    return path


def test_every_line_that_cannot_be_used_is_counted_under_its_reason(tmp_path: Path) -> None:
    last = {"prompt": "", "chosen": "a", "rejected": "b", "domain": "heart", "more": 1}
    path = write(tmp_path / "pairs.jsonl", GOOD, b"", *(line for line, _ in BAD), last)
    found, _ = readable(path, TOKENIZER, 64)
    assert found.pairs == [PreferencePair(**GOOD), PreferencePair("", "a", "b")]
    assert found.domains == [ALL, "heart"]
    wanted: dict[str, list[int]] = {}
    for number, (_, reason) in enumerate(BAD, start=3):
        wanted.setdefault(reason, []).append(number)
    assert found.skipped == wanted
    assert found.lines == [1, 3 + len(BAD)]
    assert sum(counts(found.skipped).values()) == len(BAD)
    assert next(iter(counts(found.skipped))) in {
        "no JSON",
        "no prompt, chosen and rejected as texts",
    }


def test_a_file_without_a_usable_pair_is_refused_with_the_first_line_of_each_reason(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "pairs.jsonl", b"{", {**GOOD, "chosen": ""}, b"{")
    says = r"no usable pair \(line 1: no JSON; line 2: an empty answer\), wanted lines of"
    with pytest.raises(PreferenceError, match=says):
        read_pairs(path)
    with pytest.raises(PreferenceError, match="it is empty"):
        read_pairs(write(tmp_path / "none.jsonl"))


def test_a_pair_as_long_as_the_context_is_used(tmp_path: Path) -> None:
    pair = {"prompt": "", "chosen": "x", "rejected": "yyyy"}  # eos, four bytes, eos: five are read
    path = write(tmp_path / "pairs.jsonl", pair)
    assert len(readable(path, TOKENIZER, 5)[0].pairs) == 1
    with pytest.raises(PreferenceError, match="longer than the pivot can see"):
        readable(path, TOKENIZER, 4)


def test_every_model_finds_the_same_pairs_and_a_pivot_its_own_among_them(tmp_path: Path) -> None:
    """Sources are asked about all; of their answers the pivot takes those that it can read."""
    long = {**GOOD, "chosen": "x" * 99}
    path = write(tmp_path / "pairs.jsonl", long, b"{", GOOD)
    whole, (own, read) = read_pairs(path), readable(path, TOKENIZER, 64)
    assert whole.pairs == [PreferencePair(**long), PreferencePair(**GOOD)]
    assert (own.pairs, read, own.lines) == ([PreferencePair(**GOOD)], [False, True], [3])
    assert whole.texts()[2:] == ["A valve narrows.", "A valve sings."]
    assert list(whole.skipped) == ["no JSON"]


def file_of(prompts: list[str]) -> PairFile:
    pairs = [PreferencePair(prompt, str(i), "no") for i, prompt in enumerate(prompts)]
    return PairFile(pairs, [ALL] * len(pairs), list(range(len(pairs))), {})


@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=2).filter(lambda x: len(set(x)) > 1),
    st.floats(0.01, 0.5),
    st.integers(0, 9),
    st.randoms(),
)
def test_all_pairs_of_a_prompt_are_held_out_or_none_whatever_their_order(
    prompts: list[str], share: float, seed: int, random: Any
) -> None:
    held = file_of(prompts).held_out(share, seed)
    outside = {p for p, out in zip(prompts, held, strict=True) if out}
    inside = {p for p, out in zip(prompts, held, strict=True) if not out}
    assert inside
    assert not inside & outside
    assert len(outside) == max(1, round(share * len(set(prompts))))
    shuffled = random.sample(prompts, len(prompts))
    again = file_of(shuffled).held_out(share, seed)
    assert {p for p, out in zip(shuffled, again, strict=True) if out} == outside


def test_nothing_is_held_out_of_nothing_asked_and_something_must_be_left() -> None:
    assert file_of(["a", "b"]).held_out(0, 0) == [False, False]
    assert {tuple(file_of(list("abcdef")).held_out(0.5, seed)) for seed in range(9)} != {()}
    with pytest.raises(PreferenceError, match=r"3 usable pairs of 1 prompts.* held_out: 0"):
        file_of(["a", "a", "a"]).held_out(0.1, 0)


def test_shares_are_of_the_measured_pairs_of_each_domain() -> None:
    right, measured = [True, False, True, True], [True, True, False, True]
    told = share_by_domain(right, ["b", "b", "a", "b"], measured)
    assert told == {"b": pytest.approx(2 / 3)}
