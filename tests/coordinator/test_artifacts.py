"""Promises of the artifact store: named by content, resumable, never half visible."""

import hashlib
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.artifacts import Artifacts
from protos.errors import CofuseError

DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()


def send(store: Artifacts, data: bytes, offset: int, size: int = len(DATA)) -> int:
    return store.receive(DIGEST, "a", size_bytes=size, offset_bytes=offset, chunks=[data])


@given(st.lists(st.integers(0, len(DATA)), max_size=5))
def test_an_upload_cut_anywhere_goes_on_where_it_was(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int]
) -> None:
    store = Artifacts(tmp_path_factory.mktemp("artifacts"))
    edges = sorted({0, *cuts, len(DATA)})
    for start, end in itertools.pairwise(edges):
        assert not store.has(DIGEST)
        assert store.received_bytes(DIGEST, "a") == start
        send(store, DATA[start:end], start)
    assert store.path(DIGEST).read_bytes() == DATA


def test_bytes_that_arrived_before_a_break_are_kept(tmp_path: Path) -> None:
    store = Artifacts(tmp_path)

    def broken() -> object:
        yield DATA[:100]
        raise ConnectionError

    with pytest.raises(ConnectionError):
        store.receive(DIGEST, "a", size_bytes=len(DATA), offset_bytes=0, chunks=broken())  # type: ignore[arg-type]
    assert store.received_bytes(DIGEST, "a") == 100


def test_wrong_bytes_are_refused_and_forgotten(tmp_path: Path) -> None:
    store = Artifacts(tmp_path)
    with pytest.raises(CofuseError, match="found sha256"):
        send(store, b"x" * len(DATA), 0)
    assert not store.has(DIGEST)
    assert store.received_bytes(DIGEST, "a") == 0


@pytest.mark.parametrize(("offset", "data"), [(5, DATA), (0, DATA + b"x")])
def test_a_wrong_offset_or_too_many_bytes_are_refused(
    tmp_path: Path, offset: int, data: bytes
) -> None:
    store = Artifacts(tmp_path)
    with pytest.raises(CofuseError, match=r"wanted|more bytes"):
        send(store, data, offset)
    assert not store.has(DIGEST)


@pytest.mark.parametrize("name", ["", "..", "A" * 64, "0" * 63, "../" + "0" * 61, "0" * 65])
def test_what_is_no_digest_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(CofuseError, match="sha256"):
        Artifacts(tmp_path).path(name)


def test_one_sender_cannot_see_or_spoil_the_partial_file_of_another(tmp_path: Path) -> None:
    store = Artifacts(tmp_path)
    send(store, DATA[:50], 0)
    assert store.received_bytes(DIGEST, "b") == 0
    store.receive(DIGEST, "b", size_bytes=len(DATA), offset_bytes=0, chunks=[DATA])
    assert store.path(DIGEST).read_bytes() == DATA
