import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion.codec import (
    ContributionError,
    LogitContribution,
    check_delta,
    check_logits,
    read_delta,
    read_logits,
    write_delta,
    write_logits,
)
from tests.fusion.factories import SHA, build, vocabulary_of

CUTS = [[b"ab", b"c", "\u00e9".encode()[:1], "\u00e9".encode()[1:]], [b"c"], []]
PROMPTS = ["abc\u00e9".encode(), b"c", b""]
SHAPES = {"w": (2, 3), "b": (3,)}


def good() -> LogitContribution:
    return build(CUTS, [*vocabulary_of(CUTS), b"zz", b"q"], top_k=3)[0]


def refusal(path: Path, **how: Any) -> ContributionError:
    wanted = {"prompt_set_sha256": SHA, "top_k": 3, "prompts_bytes": PROMPTS} | how
    with pytest.raises(ContributionError) as caught:
        check_logits(path, **wanted)
    return caught.value


def test_what_is_written_is_accepted_and_read_back_to_the_bit(tmp_path: Path) -> None:
    contribution = good()
    write_logits(tmp_path / "c", contribution)
    header = check_logits(tmp_path / "c", prompt_set_sha256=SHA, top_k=3, prompts_bytes=PROMPTS)
    again = read_logits(tmp_path / "c")
    assert header == again.header == contribution.header
    for field in fields(contribution)[1:]:
        left, right = getattr(contribution, field.name), getattr(again, field.name)
        assert left.dtype == right.dtype, field.name
        assert np.array_equal(left, right), field.name
    assert not list(tmp_path.glob("*.partial"))


def altered(name: str, change: Callable[[Any], Any]) -> LogitContribution:
    values = getattr(good(), name).copy()
    return replace(good(), **{name: change(values)})


def put(index: Any, value: float) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[index] = value
        return values

    return change


REFUSED: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("not_finite", "topk_logprobs", put((2, 1), np.nan)),
    ("not_finite", "own_logprob", put(0, -np.inf)),
    ("not_finite", "tail_logprob", put(0, np.nan)),
    ("id_out_of_vocabulary", "topk_ids", put((0, 0), 99)),
    ("id_out_of_vocabulary", "topk_ids", put((0, 0), -1)),
    ("id_out_of_vocabulary", "token_ids", put(0, 8)),
    ("mass", "tail_logprob", put(1, 0.0)),
    ("mass", "topk_logprobs", lambda a: a - np.float16(0.5)),
    ("malformed", "tail_logprob", put(1, 0.5)),
    ("malformed", "topk_logprobs", lambda a: a[:, ::-1]),
    ("malformed", "topk_ids", lambda a: a[:, [0, 0, 2]]),
    ("malformed", "own_logprob", lambda a: np.zeros_like(a)),
    ("malformed", "byte_ends", put(0, 3)),
    ("malformed", "byte_ends", lambda a: a[:-1]),
    ("malformed", "doc_offsets", put(1, 0)),
    ("malformed", "doc_offsets", put(1, 4)),
    ("malformed", "doc_offsets", put(-1, 2**40)),
    ("malformed", "vocab_offsets", put(1, -5)),
    ("malformed", "vocab_offsets", put(-1, 2**40)),
    ("malformed", "topk_ids", lambda a: a.astype(np.int64)),
    ("malformed", "own_logprob", lambda a: a.astype(np.float32)),
    ("malformed", "token_ids", put(4, 1)),
    ("malformed", "token_ids", put(1, 0)),
    ("malformed", "vocab_bytes", put(0, ord("z"))),
]


@pytest.mark.parametrize(("code", "name", "change"), REFUSED)
def test_every_kind_of_nonsense_is_refused_by_its_code(
    tmp_path: Path, code: str, name: str, change: Callable[[Any], Any]
) -> None:
    write_logits(tmp_path / "c", altered(name, change))
    error = refusal(tmp_path / "c")
    assert error.code == code, error
    assert ":" in str(error)  # what was found: what to do


def test_an_id_named_twice_in_a_row_is_refused_though_the_mass_is_right(tmp_path: Path) -> None:
    # Rows whose own token is among neither the first nor the second id, so nothing else is wrong.
    contribution = good()
    row = int((contribution.topk_ids != contribution.token_ids[:, None]).all(1).argmax())
    contribution.topk_ids[row, 1] = contribution.topk_ids[row, 0]
    write_logits(tmp_path / "c", contribution)
    assert "twice" in str(refusal(tmp_path / "c"))


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("wrong_prompt_set", {"prompt_set_sha256": "f" * 64}),
        ("wrong_k", {"top_k": 16}),
        ("malformed", {"prompts_bytes": [b"abcde", b"c", b""]}),
        ("malformed", {"prompts_bytes": [b"ab", b"c"]}),
        ("malformed", {"prompts_bytes": [PROMPTS[0], b"d", b""]}),
    ],
)
def test_a_good_file_of_another_round_is_refused(
    tmp_path: Path, code: str, how: dict[str, Any]
) -> None:
    write_logits(tmp_path / "c", good())
    assert refusal(tmp_path / "c", **how).code == code


@pytest.mark.parametrize(
    "header",
    [
        {"vocab_size": 3},
        {"positions": 2},
        {"documents": 0},
        {"codec_version": 99},
        {"top_k": "3"},
        {"positions": -1},
    ],
)
def test_a_header_that_contradicts_its_arrays_is_refused(
    tmp_path: Path, header: dict[str, Any]
) -> None:
    write_logits(tmp_path / "c", replace(good(), header=replace(good().header, **header)))
    assert refusal(tmp_path / "c").code in {"malformed", "wrong_k"}


def test_a_file_cut_anywhere_is_truncated(tmp_path: Path) -> None:
    write_logits(tmp_path / "c", good())
    whole = (tmp_path / "c").read_bytes()
    for length in [0, 4, 8, 100, len(whole) // 2, len(whole) - 1]:
        (tmp_path / "c").write_bytes(whole[:length])
        assert refusal(tmp_path / "c").code == "truncated", length
    (tmp_path / "c").write_bytes(whole + b"x")
    assert refusal(tmp_path / "c").code == "malformed"


def test_a_file_without_an_array_or_with_one_more_is_refused(tmp_path: Path) -> None:
    write_delta(tmp_path / "d", {}, pivot_sha256=SHA, steps=1, tokens=1)
    assert refusal(tmp_path / "d").code == "malformed"
    huge = (2**62).to_bytes(8, "little") + b"{}"
    (tmp_path / "h").write_bytes(huge)
    assert refusal(tmp_path / "h").code == "malformed"
    deep = b"[" * 100_000
    (tmp_path / "n").write_bytes(len(deep).to_bytes(8, "little") + deep)
    assert refusal(tmp_path / "n").code == "malformed"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.data())
def test_any_damage_is_accepted_as_harmless_or_refused_as_a_contribution_error(
    tmp_path: Path, data: st.DataObject
) -> None:
    write_logits(tmp_path / "c", good())
    raw = bytearray((tmp_path / "c").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "c").write_bytes(bytes(raw))
    with suppress(ContributionError):
        check_logits(tmp_path / "c", prompt_set_sha256=SHA, top_k=3, prompts_bytes=PROMPTS)
        read_logits(tmp_path / "c")


def delta() -> dict[str, np.ndarray]:
    return {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float32)}


def test_a_delta_comes_back_as_it_was(tmp_path: Path) -> None:
    write_delta(tmp_path / "d", delta(), pivot_sha256=SHA, steps=7, tokens=70)
    header = check_delta(tmp_path / "d", pivot_sha256=SHA, shapes=SHAPES)
    again, arrays = read_delta(tmp_path / "d")
    assert header == again
    assert (header.steps, header.tokens) == (7, 70)
    assert arrays.keys() == delta().keys()
    assert all(np.array_equal(arrays[n], v) for n, v in delta().items())


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("missing_tensor", {"b": None}),
        ("unknown_tensor", {"x": np.ones(3, np.float32)}),
        ("wrong_shape", {"b": np.ones(4, np.float32)}),
        ("wrong_shape", {"b": np.ones(3, np.float16)}),
        ("not_finite", {"b": np.full(3, np.nan, np.float32)}),
    ],
)
def test_a_delta_that_does_not_fit_the_pivot_is_refused(
    tmp_path: Path, code: str, change: dict[str, Any]
) -> None:
    arrays = {n: v for n, v in (delta() | change).items() if v is not None}
    write_delta(tmp_path / "d", arrays, pivot_sha256=SHA, steps=1, tokens=1)
    with pytest.raises(ContributionError) as caught:
        check_delta(tmp_path / "d", pivot_sha256=SHA, shapes=SHAPES)
    assert caught.value.code == code


def test_a_delta_from_another_pivot_and_a_logits_file_are_no_delta_of_this_round(
    tmp_path: Path,
) -> None:
    write_delta(tmp_path / "d", delta(), pivot_sha256="e" * 64, steps=1, tokens=1)
    write_logits(tmp_path / "c", good())
    for name, code in (("d", "wrong_pivot"), ("c", "malformed")):
        with pytest.raises(ContributionError) as caught:
            check_delta(tmp_path / name, pivot_sha256=SHA, shapes=SHAPES)
        assert caught.value.code == code


def test_the_header_is_plain_json_that_anyone_can_read(tmp_path: Path) -> None:
    write_logits(tmp_path / "c", good())
    raw = (tmp_path / "c").read_bytes()
    table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(table["__metadata__"]["header"])["top_k"] == 3
