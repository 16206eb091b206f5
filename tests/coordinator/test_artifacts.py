"""Promises of the artifact store: named by content, resumable, never half visible."""

import errno
import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.artifacts import MAX_PARTIALS, Artifacts
from coordinator.incoming import Piece
from protos.errors import CofuseError
from protos.files import EXIT_DISK_FAILED

DATA = bytes(range(256)) * 40
DIGEST = hashlib.sha256(DATA).hexdigest()


def store_at(folder: Path) -> Artifacts:
    return Artifacts(folder, reserve_bytes=0)


def piece(data: bytes, start: int, end: int) -> Piece:
    """Bytes of a file and the running digest with them."""
    return data[start:end], hashlib.sha256(data[:end]).digest()


def send(
    store: Artifacts,
    start: int = 0,
    end: int = len(DATA),
    *,
    pieces: Iterable[Piece] | None = None,
    sender: str = "a",
) -> None:
    """Put bytes from `start` on; complete the file when all of it is there."""
    prefix_sha256 = hashlib.sha256(DATA[:start]).digest()
    pieces = [piece(DATA, start, end)] if pieces is None else pieces
    receive(store, DIGEST, sender, pieces, start, prefix_sha256)
    if store.received_bytes(DIGEST, sender) == len(DATA):
        store.complete(DIGEST, sender, len(DATA))


def receive(
    store: Artifacts,
    sha256: str,
    sender: str,
    pieces: Iterable[Piece],
    start: int = 0,
    prefix_sha256: bytes = b"",
) -> None:
    for _ in store.receive(
        sha256,
        sender,
        size_bytes=len(DATA),
        offset_bytes=start,
        pieces=pieces,
        prefix_sha256=prefix_sha256,
    ):
        pass


@settings(max_examples=20)  # each waits for the disk
@given(st.lists(st.integers(0, len(DATA)), max_size=5), st.booleans())
def test_an_upload_cut_anywhere_goes_on_where_it_was(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], restarts: bool
) -> None:
    folder = tmp_path_factory.mktemp("artifacts")
    store = store_at(folder)
    edges = sorted({0, *cuts, len(DATA)})
    for start, end in itertools.pairwise(edges):
        assert not store.has(DIGEST)
        assert store.received_bytes(DIGEST, "a") == start
        send(store, start, end)
        store = store_at(folder) if restarts else store
    assert store.path(DIGEST).read_bytes() == DATA
    assert list((folder / "incoming").iterdir()) == []


def test_bytes_that_arrived_before_a_break_are_kept(tmp_path: Path) -> None:
    store = store_at(tmp_path)

    def broken() -> Iterator[Piece]:
        yield piece(DATA, 0, 100)
        raise ConnectionError

    with pytest.raises(ConnectionError):
        send(store, pieces=broken())
    assert store.received_bytes(DIGEST, "a") == 100


@settings(max_examples=20)  # each waits for the disk
@given(st.integers(0, 99), st.integers(0, 7))
def test_a_flipped_bit_costs_its_chunk_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    store = store_at(tmp_path_factory.mktemp("artifacts"))
    data, sha256 = piece(DATA, 50, 150)
    spoilt = bytearray(data)
    spoilt[at] ^= 1 << bit
    with pytest.raises(CofuseError, match="at byte 50 does not fit"):
        send(store, pieces=[piece(DATA, 0, 50), (bytes(spoilt), sha256)])
    assert store.received_bytes(DIGEST, "a") == 50
    send(store, 50)
    assert store.path(DIGEST).read_bytes() == DATA


@settings(max_examples=20)  # each waits for the disk
@given(st.integers(0, 299), st.sampled_from(["flip", "cut", "journal"]))
def test_after_a_power_cut_what_fits_its_digests_is_kept_and_no_more(
    tmp_path_factory: pytest.TempPathFactory, at: int, damage: str
) -> None:
    folder = tmp_path_factory.mktemp("artifacts")
    edges = [0, 100, 200, 300]
    send(store_at(folder), pieces=[piece(DATA, a, b) for a, b in itertools.pairwise(edges)])
    partial = folder / "incoming" / f"{DIGEST}.a"
    journal = partial.with_name(partial.name + ".journal")
    if damage == "flip":
        content = bytearray(partial.read_bytes())
        content[at] ^= 1
        partial.write_bytes(content)
    else:
        torn = journal if damage == "journal" else partial
        os.truncate(torn, torn.stat().st_size * at // 300)
    store = store_at(folder)
    received = store.received_bytes(DIGEST, "a")
    assert received == at // 100 * 100
    send(store, received)
    assert store.path(DIGEST).read_bytes() == DATA


def test_bytes_of_another_file_under_this_name_are_dropped_when_the_sender_comes_back(
    tmp_path: Path,
) -> None:
    store = store_at(tmp_path)
    send(store, pieces=[piece(b"x" * 50, 0, 50)])
    with pytest.raises(CofuseError, match="wanted 0"):
        send(store, 50)
    send(store)
    assert store.has(DIGEST)


def test_wrong_bytes_are_refused_and_forgotten(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    wrong = b"x" * len(DATA)
    with pytest.raises(CofuseError, match="found sha256"):
        send(store, pieces=[piece(wrong, 0, len(wrong))])
    assert not store.has(DIGEST)
    assert store.received_bytes(DIGEST, "a") == 0


@pytest.mark.parametrize(("offset", "data"), [(5, DATA), (0, DATA + b"x")])
def test_a_wrong_offset_or_too_many_bytes_are_refused(
    tmp_path: Path, offset: int, data: bytes
) -> None:
    store = store_at(tmp_path)
    with pytest.raises(CofuseError, match=r"wanted|more than"):
        send(store, offset, pieces=[piece(data, 0, len(data))])
    assert not store.has(DIGEST)


@pytest.mark.parametrize("name", ["", "..", "A" * 64, "0" * 63, "../" + "0" * 61, "0" * 65])
def test_what_is_no_digest_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    for ask in (store_at(tmp_path).path, store_at(tmp_path).has):
        with pytest.raises(CofuseError, match="sha256"):
            ask(name)


def test_one_sender_cannot_see_or_spoil_the_partial_file_of_another(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    send(store, 0, 50)
    assert store.received_bytes(DIGEST, "b") == 0
    send(store, sender="b")
    assert store.path(DIGEST).read_bytes() == DATA


def test_a_newer_upload_takes_over_from_one_that_hangs(tmp_path: Path) -> None:
    store = store_at(tmp_path)

    def hangs() -> Iterator[Piece]:
        yield piece(DATA, 0, 100)
        send(store, 100, 200)  # the sender dialled again, and this stream was never told
        yield piece(DATA, 100, 150)

    with pytest.raises(CofuseError, match="took over"):
        send(store, pieces=hangs())
    assert store.received_bytes(DIGEST, "a") == 200
    send(store, 200)
    assert store.path(DIGEST).read_bytes() == DATA


def test_what_is_not_whole_cannot_be_completed(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    send(store, 0, 50)
    with pytest.raises(CofuseError, match="found 50 bytes, wanted"):
        store.complete(DIGEST, "a", len(DATA))


def test_a_sender_has_so_many_unfinished_files_and_no_more(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    for number in range(MAX_PARTIALS + 1):
        sha256 = hashlib.sha256(b"%d" % number).hexdigest()
        if number == MAX_PARTIALS:
            with pytest.raises(CofuseError, match="unfinished uploads"):
                receive(store, sha256, "a", [piece(DATA, 0, 1)])
        else:
            receive(store, sha256, "a", [piece(DATA, 0, 1)])
    send(store, sender="b")
    assert len(store.drop_partials(older_than_s=-1)) == MAX_PARTIALS
    assert list((tmp_path / "incoming").iterdir()) == []


# ------------------------------------------------------------------------------- a failing disk


def refusal(store: Artifacts) -> str:
    """Send in four pieces; the id of the error, if there was one."""
    try:
        send(store, pieces=[piece(DATA, at, at + 2560) for at in range(0, len(DATA), 2560)])
    except CofuseError as error:
        return error.error_id
    return ""


@pytest.mark.parametrize("fails", ["pwrite", "fsync", "rename", "truncate", "open"])
def test_a_full_disk_is_said_and_the_upload_goes_on_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    """At the n-th call of every operation that writes, for each n, until none fails any more."""
    real = getattr(os, fails)
    for nth in itertools.count():
        store, calls = store_at(tmp_path / str(nth)), itertools.count()

        def full(
            *values: object, nth: int = nth, calls: Iterator[int] = calls, **more: object
        ) -> object:
            if next(calls) == nth:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*values, **more)

        monkeypatch.setattr(os, fails, full)
        said = refusal(store)
        monkeypatch.setattr(os, fails, real)
        assert said in ("", "storage_full")
        if not store.has(DIGEST):
            assert said
            send(store, store.received_bytes(DIGEST, "a"))
        assert store.path(DIGEST).read_bytes() == DATA
        if not said:
            break
    assert nth > 0


def test_a_file_that_would_eat_the_reserve_is_refused_before_its_bytes(tmp_path: Path) -> None:
    store = Artifacts(tmp_path, reserve_bytes=2**60)
    with pytest.raises(CofuseError, match="stay in reserve") as caught:
        send(store)
    assert caught.value.error_id == "storage_full"
    assert list((tmp_path / "incoming").iterdir()) == []


def test_a_failed_fsync_ends_the_process_and_nothing_is_reported_done(tmp_path: Path) -> None:
    code = (
        "import errno, os, sys; from tests.coordinator.test_artifacts import *\n"
        "def fail(_): raise OSError(errno.EIO, 'Input/output error')\n"
        "store = store_at(Path(sys.argv[1])); os.fsync = fail\n"
        "send(store); print('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_DISK_FAILED
    assert done.stdout == ""
    assert not store_at(tmp_path).has(DIGEST)


# ------------------------------------------------------------------------- damage and verifying


def test_a_file_damaged_on_disk_is_never_served_and_can_be_put_again(tmp_path: Path) -> None:
    store = store_at(tmp_path)
    send(store)
    path = store.path(DIGEST)
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CofuseError, match="store's copy") as caught:
        store.running_digests(DIGEST)
    assert caught.value.error_id == "damaged_artifact"
    assert not store.has(DIGEST)
    with pytest.raises(CofuseError, match="no whole file"):
        store.path(DIGEST)
    send(store)
    assert store.running_digests(DIGEST) == [bytes.fromhex(DIGEST)]


def test_a_copy_of_a_file_here_is_checked(tmp_path: Path) -> None:
    store, source = store_at(tmp_path / "store"), tmp_path / "file"
    source.write_bytes(DATA)
    with pytest.raises(CofuseError, match="found sha256"):
        store.add(source, "0" * 64)
    store.add(source, DIGEST)
    store.add(source, DIGEST)
    assert store.path(DIGEST).read_bytes() == DATA
    assert list((tmp_path / "store" / "incoming").iterdir()) == []
