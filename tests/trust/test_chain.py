"""Whoever edits, removes, moves, cuts off or rewrites is named by the first record it touched."""

import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from trust.canonical import canonical
from trust.chain import (
    MAX_LINE_BYTES,
    START,
    AuditError,
    Entry,
    Head,
    make_line,
    read_record,
)
from trust.checkpoints import (
    MAX_UNSIGNED,
    Checkpoint,
    make_checkpoint,
    read_checkpoint,
    verify_chain,
)

KEY, OTHER = (Ed25519PrivateKey.generate() for _ in range(2))
PUBLIC = KEY.public_key()


def chain(
    length: int, *, word: str = "", from_head: Head = START
) -> tuple[list[bytes], list[Head]]:
    """Records and the head after each."""
    lines, heads, head = [], [], from_head
    for number in range(length):
        entry = Entry(actor="cofuse://participant/a", act="x.done", obj=f"{number}{word}")
        line, head = make_line(entry, head, 1_700_000_000_000 + number)
        lines.append(line)
        heads.append(head)
    return lines, heads


def signed(heads: list[Head], *seqs: int, key: Ed25519PrivateKey = KEY) -> list[Checkpoint]:
    return [make_checkpoint(key, heads[seq - 1], 1_700_000_000_000) for seq in seqs]


LINES, HEADS = chain(12)
SIGNED = signed(HEADS, 4, 8, 12)
places = st.integers(0, len(LINES) - 1)


def test_a_chain_that_nobody_touched_is_whole_and_signed_to_its_end() -> None:
    verdict = verify_chain(LINES, SIGNED, PUBLIC)
    assert (verdict.first, verdict.head, verdict.signed) == (1, HEADS[-1], 12)
    assert verdict.broken is None


def test_an_empty_chain_is_whole() -> None:
    assert verify_chain([], [], PUBLIC).broken is None


@given(at=places, data=st.data())
@settings(deadline=None)
def test_any_changed_byte_is_named_by_its_record(at: int, data: st.DataObject) -> None:
    line = bytearray(LINES[at])
    byte = data.draw(st.integers(0, len(line) - 1))
    line[byte] ^= data.draw(st.integers(1, 255))
    verdict = verify_chain([*LINES[:at], bytes(line), *LINES[at + 1 :]], SIGNED, PUBLIC)
    assert verdict.broken is not None
    assert verdict.broken.seq == at + 1


@given(at=places)
@settings(deadline=None)
def test_a_removed_record_is_named_also_the_last(at: int) -> None:
    verdict = verify_chain(LINES[:at] + LINES[at + 1 :], SIGNED, PUBLIC)
    assert verdict.broken is not None
    assert verdict.broken.seq == at + 1


@given(one=places, other=places)
@settings(deadline=None)
def test_two_records_that_changed_places_are_named_by_the_first(one: int, other: int) -> None:
    lines = list(LINES)
    lines[one], lines[other] = lines[other], lines[one]
    verdict = verify_chain(lines, SIGNED, PUBLIC)
    if one == other:
        assert verdict.broken is None
    else:
        assert verdict.broken is not None
        assert verdict.broken.seq == min(one, other) + 1


@given(at=places)
@settings(deadline=None)
def test_a_record_with_its_right_hash_but_other_words_does_not_fit_in(at: int) -> None:
    before = HEADS[at - 1] if at else START
    forged = chain(1, word="forged", from_head=before)[0]
    verdict = verify_chain(LINES[:at] + forged + LINES[at + 1 :], SIGNED, PUBLIC)
    assert verdict.broken is not None
    signed_to = at - at % 4  # a checkpoint that covers it names the first record it doubts
    assert verdict.broken.seq == (signed_to + 1 if at % 4 == 3 else at + 2)


@given(kept=st.integers(0, 11))
@settings(deadline=None)
def test_an_end_cut_off_below_a_checkpoint_is_named(kept: int) -> None:
    verdict = verify_chain(LINES[:kept], SIGNED, PUBLIC)
    assert verdict.broken is not None
    assert verdict.broken.seq == kept + 1


@given(kept=st.integers(0, 11))
@settings(deadline=None)
def test_a_chain_written_anew_with_right_hashes_is_no_younger_than_its_checkpoint(
    kept: int,
) -> None:
    head = HEADS[kept - 1] if kept else START
    forged = LINES[:kept] + chain(12 - kept, word="forged", from_head=head)[0]
    assert verify_chain(forged, [], PUBLIC).broken is None  # the chain alone cannot tell
    verdict = verify_chain(forged, SIGNED, PUBLIC)
    assert verdict.broken is not None
    assert verdict.broken.seq == kept - kept % 4 + 1  # the first that its checkpoint doubts


@pytest.mark.parametrize(
    "forged",
    [
        replace(SIGNED[1], seq=7, head=HEADS[6].h),
        replace(SIGNED[1], ts="2020-01-01T00:00:00.000Z"),
        replace(signed(HEADS, 8, key=OTHER)[0], kid=SIGNED[0].kid),
        replace(SIGNED[1], sig="?"),
    ],
)
def test_a_checkpoint_that_the_key_did_not_sign_covers_nothing(forged: Checkpoint) -> None:
    verdict = verify_chain(LINES, [SIGNED[0], forged], PUBLIC)
    assert verdict.signed == 4
    assert verdict.broken is not None
    assert verdict.broken.seq == forged.seq


def test_the_word_of_another_key_is_none() -> None:
    verdict = verify_chain(LINES, [SIGNED[0], *signed(HEADS, 8, 12, key=OTHER)], PUBLIC)
    assert (verdict.signed, verdict.broken) == (4, None)
    lines, heads = chain(MAX_UNSIGNED + 3)
    verdict = verify_chain(lines, signed(heads, 500, MAX_UNSIGNED, key=OTHER), PUBLIC)
    assert verdict.broken is not None


def test_a_long_chain_without_checkpoints_is_not_believed() -> None:
    lines, heads = chain(MAX_UNSIGNED + 3)
    assert verify_chain(lines, signed(heads, 3), PUBLIC).broken is None
    verdict = verify_chain(lines, signed(heads, 2), PUBLIC)
    assert verdict.broken is not None
    assert verdict.broken.seq == 3


@given(first=st.integers(1, 11), last=st.integers(1, 12))
@settings(deadline=None)
def test_an_excerpt_is_whole_but_no_whole_chain(first: int, last: int) -> None:
    excerpt = LINES[first - 1 : last]
    inside = [c for c in SIGNED if first <= c.seq <= last]
    verdict = verify_chain(excerpt, inside, PUBLIC, whole=False)
    assert verdict.broken is None
    assert verdict.first == (first if excerpt else 0)
    beginless = verify_chain(excerpt, inside, PUBLIC).broken
    assert (beginless is None) == (first == 1 or not excerpt)


records = st.builds(
    Entry,
    actor=st.text(),
    act=st.text(),
    obj=st.text(),
    res=st.sampled_from(("ok", "deny")),
    why=st.text(),
    data=st.dictionaries(st.text(st.characters(max_codepoint=127)), st.integers() | st.text()),
)


@given(entry=records)
@settings(deadline=None)
def test_whatever_is_recorded_is_one_line_that_reads_back(entry: Entry) -> None:
    try:
        line, head = make_line(entry, START, 0)
    except TypeError:
        assert any(isinstance(v, int) and abs(v) >= 2**53 for v in entry.data.values())
        return
    assert b"\n" not in line
    assert canonical(read_record(line)) == line
    assert verify_chain([line], [], PUBLIC).head == head


@given(line=st.binary(max_size=200) | st.text().map(str.encode))
@settings(max_examples=500, deadline=None)
def test_foreign_bytes_are_refused_and_nothing_else_happens(line: bytes) -> None:
    for read in (read_record, read_checkpoint):
        with pytest.raises(AuditError):
            read(line)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * MAX_LINE_BYTES,
        b" " * (MAX_LINE_BYTES + 1),
        LINES[0].replace(b'"v":1', b'"v":1,"v":1'),
        LINES[0].replace(b'"seq":1', b'"seq":true'),
        json.dumps(json.loads(LINES[0])).encode(),
        b"1" * 5000,
    ],
)
def test_bombs_and_other_spellings_are_refused(line: bytes) -> None:
    with pytest.raises(AuditError):
        read_record(line)


def test_a_record_longer_than_a_line_may_be_is_not_made() -> None:
    entry = Entry(actor="a", act="b", obj="c", data={"text": "x" * MAX_LINE_BYTES})
    with pytest.raises(AuditError, match="at most"):
        make_line(entry, START, 0)


@given(value=st.sampled_from([1.5, None, {"\u00e9": 1}, {1: 2}, 2**53, [b"x"]]))
@settings(deadline=None)
def test_what_json_writes_in_many_ways_is_no_part_of_a_record(value: object) -> None:
    with pytest.raises(TypeError, match="wanted"):
        make_line(Entry(actor="a", act="b", obj="c", data={"data": value}), START, 0)
