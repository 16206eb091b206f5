import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fusion.budget import keep
from fusion.codec import (
    LogitFile,
    LogitWriter,
    check_asked,
    check_logits,
    read_logits,
    rewrite_logits,
    write_logits,
)
from fusion.contribution import (
    ROW_ARRAYS,
    ContributionError,
    LogitContribution,
    LogitHeader,
    join,
    runs,
)
from fusion.delta_file import write_delta
from fusion.packing import MAX_ERROR, pack
from tests.fusion.factories import SHA, build, contributions, sampled, vocabulary_of

CUTS = [[b"ab", b"c", "\u00e9".encode()[:1], "\u00e9".encode()[1:]], [b"c"], []]
PROMPTS = ["abc\u00e9".encode(), b"c", b""]
FILES = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def good(top_k: int = 3) -> LogitContribution:
    return build(CUTS, [*vocabulary_of(CUTS), b"zz", b"q"], top_k=top_k)[0]


def check(path: Path, texts: list[bytes], top_k: int) -> LogitHeader:
    return check_logits(path, prompts=texts, prompt_set_sha256=SHA, top_k=top_k)


def refusal(path: Path, **how: Any) -> ContributionError:
    wanted: dict[str, Any] = {"prompts": PROMPTS, "prompt_set_sha256": SHA, "top_k": 3}
    with pytest.raises(ContributionError) as caught:
        check_logits(path, **(wanted | how))
    return caught.value


def same(left: LogitContribution, right: LogitContribution) -> None:
    assert left.header == right.header
    for field in fields(left)[1:]:
        a, b = getattr(left, field.name), getattr(right, field.name)
        assert a.dtype == b.dtype, field.name
        assert np.array_equal(a, b), field.name


# ------------------------------------------------------------------------------- the round trip
@FILES
@given(made=contributions())
def test_ids_come_back_exactly_and_logprobs_within_a_thirty_second(
    tmp_path: Path, made: tuple[LogitContribution, list[bytes]]
) -> None:
    contribution, texts = made
    write_logits(tmp_path / "c", contribution)
    assert check(tmp_path / "c", texts, contribution.header.top_k) == contribution.header
    again = read_logits(tmp_path / "c", texts)
    for name in ("doc_offsets", "token_ids", "byte_ends", "topk_ids", "vocab_bytes"):
        left, right = getattr(contribution, name), getattr(again, name)
        assert left.dtype == right.dtype, name
        assert np.array_equal(left, right), name
    # Below the last code nothing is told apart; what was never there stays at the floor.
    there = again.topk_ids >= 0
    for name, which in (("own_logprob", ...), ("topk_logprobs", there), ("tail_logprob", ...)):
        left, right = getattr(contribution, name)[which], getattr(again, name)[which]
        assert right.dtype == np.float32
        if left.size:
            gap = np.abs(np.maximum(left, -255 / 16) - np.maximum(right, -255 / 16))
            assert gap.max() <= MAX_ERROR + 1e-6, name
    assert (again.topk_logprobs[~there] == contribution.topk_logprobs[~there]).all()
    if contribution.header.sampler == "samples":
        assert np.array_equal(contribution.topk_logprobs, again.topk_logprobs)
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@FILES
@given(made=contributions(), data=st.data())
def test_what_was_read_is_written_again_to_the_same_bytes_whole_or_in_runs(
    tmp_path: Path, made: tuple[LogitContribution, list[bytes]], data: st.DataObject
) -> None:
    contribution, texts = made
    write_logits(tmp_path / "c", contribution)
    again = read_logits(tmp_path / "c", texts)
    rows = data.draw(st.integers(1, again.header.positions))
    with LogitWriter(
        tmp_path / "again",
        again.header,
        doc_offsets=again.doc_offsets,
        vocab_bytes=again.vocab_bytes,
        vocab_offsets=again.vocab_offsets,
        shipped=again.shipped,
    ) as writer:
        for start, stop in runs(again.doc_offsets, rows):
            writer.write(again.documents(start, stop))
    assert (tmp_path / "c").read_bytes() == (tmp_path / "again").read_bytes()


@FILES
@given(made=contributions(), data=st.data())
def test_documents_read_by_runs_are_those_of_the_whole(
    tmp_path: Path, made: tuple[LogitContribution, list[bytes]], data: st.DataObject
) -> None:
    contribution, texts = made
    write_logits(tmp_path / "c", contribution)
    file, whole = LogitFile(tmp_path / "c", texts), read_logits(tmp_path / "c", texts)
    start = data.draw(st.integers(0, len(texts) - 1))
    stop = data.draw(st.integers(start + 1, len(texts)))
    same(file.documents(start, stop), whole.documents(start, stop))
    same(join([file.documents(i, i + 1) for i in range(len(texts))]), whole)


def test_rows_far_into_a_file_are_found_by_their_bits(tmp_path: Path) -> None:
    texts = [b"ab" * 10_000] * 4
    cuts = [[b"a", b"b"] * 10_000] * 4
    whole, _ = build(cuts, [b"", b"a", b"b", b"c"], top_k=2)
    chosen = np.random.default_rng(0).random(whole.header.positions) < 0.3
    write_logits(tmp_path / "c", keep(whole, chosen, SHA))
    check(tmp_path / "c", texts, 2)
    again = LogitFile(tmp_path / "c", texts).documents(2, 3)
    rows = slice(*whole.doc_offsets[2:4])
    assert np.array_equal(again.shipped, chosen[rows])
    assert np.array_equal(again.topk_ids[again.shipped], whole.topk_ids[rows][chosen[rows]])


def test_a_token_of_55_bytes_at_sixteen_of_152_thousand_ids(tmp_path: Path) -> None:
    vocab, rows, rng = 151_936, 500, np.random.default_rng(0)
    pieces = [b"", *(index.to_bytes(3, "little") for index in range(1, vocab))]
    ids = np.asarray([*rng.integers(1, vocab, rows - 1), 0], np.int32)
    top_ids = np.stack([rng.choice(vocab, 16, replace=False) for _ in range(rows)])
    top_ids[top_ids == ids[:, None]] = 1
    base = build([[b"a"]], [b"", b"a"], top_k=1)[0]
    header = replace(
        base.header, vocab_size=vocab, top_k=16, documents=1, positions=rows, shipped=rows
    )
    share = np.log(np.full((rows, 16), 1 / 17, np.float32))
    made = LogitContribution(
        header=header,
        doc_offsets=np.asarray([0, rows], np.int64),
        token_ids=ids,
        byte_ends=(np.minimum(np.arange(1, rows + 1), rows - 1) * 3).astype(np.int32),
        own_logprob=np.full(rows, -9, np.float32),
        topk_ids=np.sort(top_ids, axis=1).astype(np.int32),
        topk_logprobs=share,
        tail_logprob=share[:, 0],
        vocab_bytes=np.frombuffer(b"".join(pieces), np.uint8),
        vocab_offsets=np.cumsum([0, *map(len, pieces)]).astype(np.int64),
    )
    write_logits(tmp_path / "c", made)
    table = 3 * (vocab - 1) + 2 * vocab
    once = table + 8 * 2 + int.from_bytes((tmp_path / "c").read_bytes()[:8], "little") + 8
    assert ((tmp_path / "c").stat().st_size - once) / rows == 55
    again = read_logits(tmp_path / "c", [b"".join(pieces[i] for i in ids)])
    assert np.array_equal(again.topk_ids, made.topk_ids)
    assert np.array_equal(again.token_ids, ids)


def test_a_token_longer_than_a_byte_can_count_is_carried(tmp_path: Path) -> None:
    long = b"-" * 300
    contribution, _ = build([[long, b"a"]], [b"", b"a", long], top_k=2)
    write_logits(tmp_path / "c", contribution)
    check(tmp_path / "c", [long + b"a"], 2)
    assert np.array_equal(
        read_logits(tmp_path / "c", [long + b"a"]).token_ids, contribution.token_ids
    )


@pytest.mark.parametrize("own", [1, 2])
def test_of_two_ids_with_the_same_bytes_the_one_the_row_agrees_with_is_read(
    tmp_path: Path, own: int
) -> None:
    contribution, dense = build([[b"a"]], [b"", b"a", b"b"], top_k=3)
    twins = replace(contribution, vocab_bytes=np.frombuffer(b"aa", np.uint8))
    twins.token_ids[0], twins.own_logprob[0] = own, dense[0, own]
    write_logits(tmp_path / "c", twins)
    check(tmp_path / "c", [b"a"], 3)
    assert read_logits(tmp_path / "c", [b"a"]).token_ids[0] == own


def test_a_writer_that_fails_or_is_given_too_little_leaves_nothing(tmp_path: Path) -> None:
    whole = good()
    how = {n: getattr(whole, n) for n in ("doc_offsets", "vocab_bytes", "vocab_offsets")}
    with (
        pytest.raises(ValueError, match="were told"),
        LogitWriter(tmp_path / "c", whole.header, **how) as writer,
    ):
        writer.write(whole.documents(0, 2))
    with (
        pytest.raises(ValueError, match="other lengths"),
        LogitWriter(tmp_path / "c", whole.header, **how) as writer,
    ):
        writer.write(whole.documents(1, 3))
    other = keep(whole, np.arange(whole.header.positions) > 0, SHA)
    with (
        pytest.raises(ValueError, match="other rows"),
        LogitWriter(tmp_path / "c", other.header, shipped=~other.shipped, **how) as writer,
    ):
        writer.write(other)
    whole.own_logprob[1] = np.nan
    with pytest.raises(ContributionError) as caught:
        write_logits(tmp_path / "c", whole)
    assert caught.value.code == "not_finite"
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------- hostile files
def spoiled(
    path: Path,
    change: Callable[[dict[str, Any]], Any],
    contribution: LogitContribution | None = None,
    **header: Any,
) -> Path:
    """A good file with its arrays changed in place, or its header."""
    write_logits(path, contribution or good())
    arrays = {name: values.copy() for name, values in load_file(path).items()}
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    change(arrays)
    values = json.loads(metadata["header"]) | header
    save_file(arrays, path, metadata=metadata | {"header": json.dumps(values)})
    return path


def put(name: str, index: Any, value: int) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name][index] = value

    return change


def swap(name: str, make: Callable[[Any], Any]) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        arrays[name] = np.ascontiguousarray(make(arrays[name]))

    return change


def ids(row: int, values: list[int]) -> Callable[[dict[str, Any]], None]:
    return put("topk_ids", row, pack(np.asarray([values]), 3)[0])  # type: ignore[arg-type]


REFUSED: list[tuple[str, str, Callable[[dict[str, Any]], Any]]] = [
    ("id_out_of_vocabulary", "0..6", ids(0, [7, 1, 2])),
    ("mass", "sum to", put("tail", 1, 0)),
    ("mass", "sum to", swap("topk", lambda a: a + np.uint8(8))),
    ("malformed", "sorted", swap("topk", lambda a: a[:, ::-1])),
    ("malformed", "twice", ids(2, [1, 1, 2])),
    ("malformed", "contradicts", swap("own", np.zeros_like)),
    ("malformed", "behind", put("topk_ids", (0, -1), 255)),
    ("malformed", "bytes", put("byte_lengths", 0, 3)),
    ("malformed", "spell", put("byte_lengths", slice(0, 2), [1, 2])),  # type: ignore[arg-type]
    ("malformed", "byte_lengths", swap("byte_lengths", lambda a: a[:-1])),
    ("malformed", "its eos", put("byte_lengths", 4, 1)),
    ("malformed", "its eos", put("byte_lengths", 1, 0)),
    ("malformed", "doc_offsets", put("doc_offsets", 1, 0)),
    ("malformed", "eos", put("doc_offsets", 1, 4)),
    ("malformed", "doc_offsets", put("doc_offsets", -1, 2**40)),
    ("malformed", "doc_offsets", put("doc_offsets", 1, -(2**62))),
    ("malformed", "doc_offsets", put("doc_offsets", 1, 2**62)),
    ("malformed", "vocab_lengths", put("vocab_lengths", 1, 200)),
    ("malformed", "vocab_lengths", put("vocab_lengths", slice(0, 2), [2, 0])),  # type: ignore[arg-type]
    ("malformed", "spell", put("vocab_bytes", 0, ord("z"))),
    ("malformed", "topk_ids", swap("topk_ids", lambda a: a.astype(np.int64))),
    ("malformed", "own is", swap("own", lambda a: a.astype(np.float16))),
    ("malformed", "belong", lambda arrays: arrays.update(more=np.zeros(3, np.uint8))),
    ("malformed", "unreadable", lambda arrays: arrays.update(more=np.zeros(3, np.float64))),
    ("malformed", "tail", lambda arrays: arrays.pop("tail")),
]


@pytest.mark.parametrize(("code", "says", "change"), REFUSED)
def test_every_kind_of_nonsense_is_refused_by_its_code(
    tmp_path: Path, code: str, says: str, change: Callable[[dict[str, Any]], Any]
) -> None:
    error = refusal(spoiled(tmp_path / "c", change))
    assert (error.code, says in str(error)) == (code, True), error
    assert ":" in str(error)  # what was found: what to do


@pytest.mark.parametrize(
    ("code", "header"),
    [
        ("malformed", {"vocab_size": 3}),
        ("malformed", {"vocab_size": 2**40}),
        ("malformed", {"positions": 2}),
        ("malformed", {"positions": 2**50}),
        ("malformed", {"documents": 0}),
        ("malformed", {"shipped": 5}),
        ("malformed", {"shipped": 5, "pivot_sha256": SHA}),
        ("malformed", {"codec_version": 1}),
        ("malformed", {"positions": -1}),
        ("malformed", {"top_k": "3"}),
        ("malformed", {"eos_id": 7}),
        ("malformed", {"eos_id": 2}),
        ("malformed", {"prefix_bytes": 1}),
        ("malformed", {"prefix_bytes": 2}),
        ("malformed", {"sampler": "greedy"}),
        ("malformed", {"sampler": "samples"}),
        ("malformed", {"sampler": "samples", "draws": 5}),
        ("malformed", {"draws": 5}),
        ("malformed", {"model_sha256": "../../x"}),
        ("malformed", {"pivot_sha256": "x"}),
        ("malformed", {"more": 1}),
        ("wrong_k", {"top_k": 4}),
        ("wrong_prompt_set", {"prompt_set_sha256": "e" * 64}),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, code: str, header: dict[str, Any]) -> None:
    assert refusal(spoiled(tmp_path / "c", lambda arrays: None, **header)).code == code


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("wrong_prompt_set", {"prompt_set_sha256": "f" * 64}),
        ("wrong_k", {"top_k": 16}),
        ("malformed", {"prompts": [b"abcde", b"c", b""]}),
        ("malformed", {"prompts": [b"ab", b"c"]}),
        ("malformed", {"prompts": [PROMPTS[0], b"d", b""]}),
        ("malformed", {"prompts": [*PROMPTS[:2], b"c"]}),
    ],
)
def test_a_good_file_of_another_round_is_refused(
    tmp_path: Path, code: str, how: dict[str, Any]
) -> None:
    write_logits(tmp_path / "c", good())
    assert refusal(tmp_path / "c", **how).code == code


def test_ids_that_are_not_the_likeliest_are_refused_though_the_mass_is_right(
    tmp_path: Path,
) -> None:
    """Two ids of no weight; all the mass is said to be in the five others."""
    flat = good(2)
    flat.topk_logprobs[:], flat.tail_logprob[:], flat.own_logprob[:] = -9, 0, -9
    write_logits(tmp_path / "c", flat)
    error = refusal(tmp_path / "c", top_k=2)
    assert (error.code, "likeliest ids" in str(error)) == ("mass", True)


@pytest.mark.parametrize(
    "change",
    [
        put("topk", (0, 0), 200),
        put("topk", 0, 0),
        swap("topk", lambda a: a[:, ::-1]),
        lambda arrays: arrays.update(tail=arrays["own"]),
        put("topk_ids", (0, 0), 0),
    ],
)
def test_draws_that_do_not_add_up_are_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    drawn = sampled(*build(CUTS, [*vocabulary_of(CUTS), b"zz", b"q"], top_k=7), draws=20)
    assert drawn.topk_ids[0, 0] != 0
    error = refusal(spoiled(tmp_path / "c", change, drawn), top_k=7)
    assert error.code == "malformed"


@pytest.mark.parametrize("kept", [True, False])
def test_an_own_logprob_that_its_row_contradicts_is_refused(tmp_path: Path, kept: bool) -> None:
    """One row alone: a kept token's is the row's own; another's is no likelier than the last."""
    whole = good()
    hit = (whole.topk_ids == whole.token_ids[:, None]).any(axis=1)
    row = int((hit == kept).argmax())
    assert hit[row] == kept
    whole.own_logprob[row] = whole.topk_logprobs[row, -1] + (-1 if kept else 0.2)
    write_logits(tmp_path / "c", whole)
    assert "contradicts" in str(refusal(tmp_path / "c"))


def test_a_file_cut_anywhere_is_truncated(tmp_path: Path) -> None:
    write_logits(tmp_path / "c", good())
    whole = (tmp_path / "c").read_bytes()
    for length in [*range(0, len(whole), 31), len(whole) - 1]:
        (tmp_path / "c").write_bytes(whole[:length])
        assert refusal(tmp_path / "c").code == "truncated", length
    (tmp_path / "c").write_bytes(whole + b"x")
    assert refusal(tmp_path / "c").code == "malformed"


def test_arrays_that_overlap_or_leave_a_gap_are_refused(tmp_path: Path) -> None:
    write_logits(tmp_path / "c", good())
    raw = (tmp_path / "c").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    for shift in (-1, 1, -(10**9), 10**12):
        table = json.loads(raw[8 : 8 + length])
        table["own"]["data_offsets"] = [o + shift for o in table["own"]["data_offsets"]]
        text = json.dumps(table).encode()
        body = len(text).to_bytes(8, "little") + text + raw[8 + length :]
        (tmp_path / "c").write_bytes(body)
        found = str(refusal(tmp_path / "c"))
        assert "starts at byte" in found or "whole numbers" in found, found


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    write_delta(tmp_path / "d", {}, pivot_sha256=SHA, steps=1, tokens=1)
    assert refusal(tmp_path / "d").code == "malformed"
    (tmp_path / "h").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert refusal(tmp_path / "h").code == "malformed"
    deep = b"[" * 100_000
    (tmp_path / "n").write_bytes(len(deep).to_bytes(8, "little") + deep)
    assert refusal(tmp_path / "n").code == "malformed"


@settings(FILES, max_examples=200)
@given(made=contributions(), data=st.data())
def test_any_damage_is_refused_as_a_contribution_error_or_makes_sense(
    tmp_path: Path, made: tuple[LogitContribution, list[bytes]], data: st.DataObject
) -> None:
    contribution, texts = made
    path, top_k = tmp_path / "c", contribution.header.top_k
    write_logits(path, contribution)
    raw = bytearray(path.read_bytes())
    start = int.from_bytes(raw[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 2))):
        # Half of the damage goes where the arrays are: the header is longer than they.
        low = data.draw(st.sampled_from([0, start]))
        raw[data.draw(st.integers(low, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(raw))
    try:
        header = check(path, texts, top_k)
    except ContributionError:
        return
    found = read_logits(path, texts)
    assert found.header == header
    for name in ROW_ARRAYS:
        assert np.isfinite(getattr(found, name)).all()
    assert found.topk_ids.max(initial=-1) < header.vocab_size
    lengths = np.diff(found.vocab_offsets)
    assert lengths[found.token_ids].sum() == sum(
        len(text) + header.prefix_bytes * bool(text) for text in texts
    )
    # Whatever was let through says the same when it is written by ourselves.
    write_logits(tmp_path / "again", found)
    assert check(tmp_path / "again", texts, top_k) == header


def test_the_header_is_plain_json_that_anyone_can_read(tmp_path: Path) -> None:
    write_logits(tmp_path / "c", good())
    raw = (tmp_path / "c").read_bytes()
    table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(table["__metadata__"]["header"])["top_k"] == 3
    assert set(load_file(tmp_path / "c")) == {
        *("doc_offsets", "vocab_lengths", "vocab_bytes", "byte_lengths", "own"),
        *("topk_ids", "topk", "tail"),
    }


@pytest.mark.parametrize(
    "change",
    [
        {"sampler": "samples"},
        {"pivot_sha256": "d" * 64},
        {"shipped": 99},
        {"shipped": 51, "share": 0.5, "wanted": "e" * 64, "pivot_sha256": "e" * 64},
        {"shipped": 50, "share": 0.5, "wanted": "e" * 64, "pivot_sha256": "f" * 64},
    ],
)
def test_rows_chosen_otherwise_than_asked_are_refused(change: dict[str, Any]) -> None:
    header = build([[b"a"]], [b"", b"a"], top_k=1)[0].header
    share, wanted = change.pop("share", 1.0), change.pop("wanted", "")
    asked = {"sampler": "top_k", "draws": 50, "share": share, "pivot_sha256": wanted or "d" * 64}
    right = replace(header, positions=100, shipped=round(100 * share), pivot_sha256=wanted)
    check_asked(right, **asked)
    with pytest.raises(ContributionError, match="the round asks for"):
        check_asked(replace(right, **change), **asked)


# ------------------------------------------------------------------------------------ rewriting
def rewrite(path: Path, texts: list[bytes], top_k: int) -> bytes:
    out = path.with_name("rewritten")
    rewrite_logits(path, out, prompts=texts, prompt_set_sha256=SHA, top_k=top_k)
    return out.read_bytes()


@pytest.mark.parametrize("kind", ["whole", "chosen", "samples"])
def test_a_file_of_ours_is_rewritten_byte_for_byte(tmp_path: Path, kind: str) -> None:
    contribution, dense = build(CUTS, [*vocabulary_of(CUTS), b"bc", b"q"], top_k=3)
    if kind == "samples":
        contribution = sampled(contribution, dense, draws=7)
    elif kind == "chosen":
        contribution = keep(contribution, np.arange(contribution.header.positions) % 2 > 0, SHA)
    write_logits(tmp_path / "c", contribution)
    assert rewrite(tmp_path / "c", PROMPTS, 3) == (tmp_path / "c").read_bytes()


def test_words_that_only_the_vocabulary_knows_do_not_leave_and_the_rest_stays(
    tmp_path: Path,
) -> None:
    vocabulary = [*vocabulary_of(CUTS), b" Fadiboka", b"q"]
    write_logits(tmp_path / "c", build(CUTS, vocabulary, top_k=3)[0])
    before = read_logits(tmp_path / "c", PROMPTS)
    assert b"Fadiboka" in (tmp_path / "c").read_bytes()
    assert b"Fadiboka" not in rewrite(tmp_path / "c", PROMPTS, 3)
    after = read_logits(tmp_path / "rewritten", PROMPTS)
    for field in fields(before)[1:]:
        if not field.name.startswith("vocab"):
            assert np.array_equal(getattr(before, field.name), getattr(after, field.name))
    check(tmp_path / "rewritten", PROMPTS, 3)


def test_what_a_writer_could_hide_in_the_layout_is_gone_after_rewriting(tmp_path: Path) -> None:
    """The order of the header's keys, its spaces: each could spell a word."""
    write_logits(tmp_path / "c", good())
    honest = (tmp_path / "c").read_bytes()
    size = int.from_bytes(honest[:8], "little")
    table = json.loads(honest[8 : 8 + size])
    hidden = json.dumps(dict(reversed(table.items())), indent=3).encode() + b" \n\t \n  "
    (tmp_path / "h").write_bytes(len(hidden).to_bytes(8, "little") + hidden + honest[8 + size :])
    check(tmp_path / "h", PROMPTS, 3)  # its values are good
    assert rewrite(tmp_path / "h", PROMPTS, 3) == rewrite(tmp_path / "c", PROMPTS, 3)


def test_a_file_that_would_be_refused_is_not_rewritten(tmp_path: Path) -> None:
    contribution = good()
    twice = contribution.topk_ids.copy()
    twice[:, 1] = twice[:, 0]
    write_logits(tmp_path / "c", replace(contribution, topk_ids=twice))
    with pytest.raises(ContributionError):
        rewrite(tmp_path / "c", PROMPTS, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
