"""A header that passes means one thing to every parser, and describes its file to the last byte."""

import json
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save_file

from trust.safetensors_header import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Header,
    HeaderError,
    parse_header,
    read_header,
)

Table = dict[str, Any]
NAMES = st.text("abcXYZ019_:-.", min_size=1, max_size=12).map(lambda text: f"w{text}")
TENSORS = st.dictionaries(
    NAMES.filter(lambda name: ".." not in name),
    st.tuples(st.sampled_from(sorted(DTYPE_BYTES)), st.lists(st.integers(0, 4), max_size=4)),
    max_size=6,
)


def table_of(tensors: dict[str, tuple[str, list[int]]]) -> tuple[Table, int]:
    """A header with the tensors one behind the other, and their bytes."""
    table: Table = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + int(np.prod(shape, dtype=np.int64)) * DTYPE_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    return table, end


GOOD, GOOD_BYTES = table_of({"a.weight": ("F32", [2, 3]), "b": ("BF16", []), "empty": ("U8", [0])})


def library_reads(raw: bytes, data_bytes: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    whole = len(raw).to_bytes(8, "little") + raw + bytes(data_bytes)
    return {name: (at["dtype"], tuple(at["shape"])) for name, at in deserialize(whole)}


def ours(header: Header) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (entry.dtype, entry.shape) for name, entry in header.tensors.items()}


@settings(max_examples=40, deadline=None)
@given(
    TENSORS,
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t:\r")]),
    st.integers(0, 2**32).map(random.Random),
)
def test_what_it_reads_is_what_was_written_in_any_spacing_and_order(
    tensors: dict[str, tuple[str, list[int]]], separators: tuple[str, str], order: random.Random
) -> None:
    table, size = table_of(tensors)
    mixed = {
        name: dict(order.sample(list(entry.items()), len(entry))) for name, entry in table.items()
    }
    raw = json.dumps(mixed, separators=separators).encode() + b" " * order.randrange(9)
    found = parse_header(raw, size)
    assert ours(found) == {name: (dtype, tuple(s)) for name, (dtype, s) in tensors.items()}
    assert found.metadata == {"format": "pt"}
    assert found.data_start == 8 + len(raw)


def test_files_of_the_library_pass(tmp_path: Path) -> None:
    arrays = {"x": np.ones((3, 2), np.float16), "y": np.zeros(5, np.int64)}
    save_file(arrays, tmp_path / "f", metadata={"format": "pt"})
    found = read_header(tmp_path / "f", schema={"x": ("F16", (3, 2)), "y": ("I64", (5,))})
    assert found.tensors["x"].shape == (3, 2)
    assert found.data_start + 12 + 40 == (tmp_path / "f").stat().st_size


@pytest.mark.parametrize(
    "schema",
    [
        {"x": ("F16", (3, 2))},
        {"x": ("F16", (3, 2)), "y": ("I64", (5,)), "z": ("U8", ())},
        {"x": ("F16", (2, 3)), "y": ("I64", (5,))},
        {"x": ("BF16", (3, 2)), "y": ("I64", (5,))},
    ],
)
def test_a_schema_is_kept_to_the_letter(tmp_path: Path, schema: Any) -> None:
    save_file({"x": np.ones((3, 2), np.float16), "y": np.zeros(5, np.int64)}, tmp_path / "f", {})
    with pytest.raises(HeaderError, match=r"in the file or|wanted"):
        read_header(tmp_path / "f", schema=schema)


def changed(**entries: Any) -> bytes:
    return json.dumps({**GOOD, **entries}).encode()


def entry(dtype: Any = "U8", shape: Any = (0,), places: Any = (26, 26)) -> Table:
    return {"dtype": dtype, "shape": shape, "data_offsets": places}


def twice(name: str) -> bytes:
    again = json.dumps({name: GOOD[name]})[1:-1]
    return json.dumps(GOOD)[:-1].encode() + b"," + again.encode() + b"}"


BOMBS: dict[str, bytes] = {
    "a million empty tensors": b"{" + b",".join(
        b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(60_000)
    ) + b"}",
    "deep nesting": b'{"a":' + b"[" * (MAX_HEADER_BYTES - 6),
    "empty lists": b'{"a":[' + b"[]," * (MAX_HEADER_BYTES // 3 - 3) + b"]}",
    "spaces": b"{" + b" " * (MAX_HEADER_BYTES - 1),
    "sides": b'{"a":{"dtype":"U8","shape":[' + b"1," * (MAX_HEADER_BYTES // 2 - 20),
    "quotes": b'{"__metadata__":{"format":"' + b'\\"' * (MAX_HEADER_BYTES // 2 - 20),
    "a long name": b'{"' + b"a" * (MAX_HEADER_BYTES - 3),
    "digits": b'{"a":{"dtype":"U8","shape":[' + b"9" * (MAX_HEADER_BYTES - 40),
}  # fmt: skip
BAD: dict[str, bytes] = {
    "a name twice": twice("b"),
    "metadata twice": twice("__metadata__"),
    "a path": changed(**{"../../x": entry()}),
    "an absolute path": changed(**{"/etc/x": entry()}),
    "dots": changed(**{"a..b": entry()}),
    "an escaped name": changed(**{"\u00e4": entry()}),
    "an empty name": changed(**{"": entry()}),
    "an unknown key": changed(c={**entry(), "more": 1}),
    "a key short": changed(c={"dtype": "U8", "shape": [0]}),
    "an unknown dtype": changed(c=entry("F4")),
    "nine sides": changed(c=entry(shape=[0] * 9)),
    "a negative side": changed(c=entry(shape=[-1, 0])),
    "a fraction": changed(c=entry(shape=[0.0])),
    "a wrong size": changed(c=entry(shape=[1])),
    "an overflowing size": changed(c=entry(shape=[2**32, 2**32], places=(26, 26))),
    "a hole": changed(c=entry(places=(27, 27))),
    "an overlap": changed(c=entry(shape=[4], places=(0, 4))),
    "a dtype twice": changed().replace(b'"dtype": "BF16",', b'"dtype": "BF16", "dtype": "BF16",'),
    "foreign metadata": changed(__metadata__={"format": "pt", "run": "me"}),
    "metadata that is no text": changed(__metadata__={"format": {}}),
    "a lone surrogate": changed(__metadata__={"format": "\ud800"}),
    "something behind": changed() + b"x",
    "a comma too much": changed()[:-1] + b",}",
    "nothing": b"",
    "a list": b"[]",
    "no text": b"\xff\xfe",
    **BOMBS,
}


@pytest.mark.parametrize("name", BAD)
def test_everything_else_is_refused_within_64_mib(name: str) -> None:
    tracemalloc.start()
    with pytest.raises(HeaderError) as caught:
        parse_header(BAD[name], GOOD_BYTES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(str(caught.value)) < 400
    assert peak < 64 << 20


def test_a_header_costs_a_kilobyte_a_tensor_and_there_is_a_most() -> None:
    """So the largest costs 16 MiB; a quarter of it is measured."""
    names = [f"model.layers.{n}.self_attn.q_proj.weight" for n in range(MAX_TENSORS // 4)]
    table, size = table_of({name: ("F32", [2, 2]) for name in names})
    raw = json.dumps(table).encode()
    tracemalloc.start()
    assert len(parse_header(raw, size).tensors) == len(names)
    assert tracemalloc.get_traced_memory()[1] < 1024 * len(names)
    tracemalloc.stop()
    empty = b",".join(
        b'"t%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % n for n in range(MAX_TENSORS)
    )
    assert len(parse_header(b"{" + empty + b"}", 0).tensors) == MAX_TENSORS
    one_more = b',"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    with pytest.raises(HeaderError, match="more than"):
        parse_header(b"{" + empty + one_more, 0)


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda raw: raw[:7], "truncated"),
        (lambda raw: raw[:20], "truncated"),
        (lambda raw: b"\xff" * 7, "truncated"),
        (lambda raw: raw[:-1], "truncated"),
        (lambda raw: raw + b"x", "malformed"),
        (lambda raw: (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + raw[8:], "malformed"),
        (lambda raw: (2**64 - 1).to_bytes(8, "little") + raw[8:], "malformed"),
    ],
)
def test_a_file_that_ends_early_is_told_from_a_bad_one(
    tmp_path: Path, damage: Callable[[bytes], bytes], code: str
) -> None:
    save_file({"x": np.ones(3)}, tmp_path / "f")
    (tmp_path / "f").write_bytes(damage((tmp_path / "f").read_bytes()))
    with pytest.raises(HeaderError) as caught:
        read_header(tmp_path / "f")
    assert caught.value.code == code


def damaged(order: random.Random, raw: bytes) -> bytes:
    """Cut, doubled, overwritten and swapped pieces: near enough to pass the first checks."""
    data = bytearray(raw)
    for _ in range(order.randint(1, 4)):
        at, length = order.randrange(len(data) + 1), order.randrange(1, 12)
        piece = order.choice(
            [b"", bytes(data[at : at + length]), order.randbytes(length), b'"', b"{", b"}", b",",
             b"0", b"-1", b"null", b"1e9", b'"shape"', b" ", b"\\", b"[", b"]", b"__metadata__"]
        )  # fmt: skip
        data[at : at + order.choice([0, length])] = piece
    return bytes(data)


@settings(max_examples=100, deadline=None)
@given(TENSORS, st.integers(0, 2**32).map(random.Random))
def test_fuzzed_headers_are_refused_or_mean_the_same_to_the_library(
    tensors: dict[str, tuple[str, list[int]]], order: random.Random
) -> None:
    table, size = table_of(tensors)
    raw = json.dumps(table).encode()
    for _ in range(40):
        found = damaged(order, raw)
        try:
            header = parse_header(found, size)
        except HeaderError:
            continue
        assert library_reads(found, size) == ours(header)


@settings(max_examples=300)
@given(st.binary(max_size=200), st.integers(0, 2**63))
def test_any_bytes_are_refused_or_read(raw: bytes, size: int) -> None:
    try:
        parse_header(raw, size)
    except HeaderError:
        return
    assert library_reads(raw, size) == {}


def test_the_library_alone_would_take_what_we_refuse() -> None:
    """Why this module is here: paths and doubled names pass there."""
    assert "../../x" in library_reads(BAD["a path"], GOOD_BYTES)
    library_reads(BAD["a name twice"], GOOD_BYTES)
    with pytest.raises(SafetensorError):
        library_reads(BAD["a hole"], GOOD_BYTES)
