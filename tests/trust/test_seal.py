"""What is sealed opens for its recipient alone, and only as it was sealed."""

import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trust import seal
from trust.canonical import canonical
from trust.keys import KeyFileError
from trust.seal import (
    MAX_HEADER_BYTES,
    TAG_BYTES,
    SealError,
    open_file,
    read_header,
    seal_file,
)
from trust.seal_keys import (
    CLASSIC,
    HYBRID,
    Opener,
    Recipient,
    load_opener,
    load_recipient,
    new_pair,
    save_recipient,
)

CHUNK = 1000


@dataclass(frozen=True)
class Pair:
    """A recipient's two halves, and a folder to work in."""

    folder: Path
    recipient: Recipient
    opener: Opener

    def seal(self, content: bytes, statement: str = "") -> bytes:
        (self.folder / "plain").write_bytes(content)
        seal_file(self.folder / "plain", self.folder / "sealed", self.recipient, statement)
        return (self.folder / "sealed").read_bytes()

    def open(self, sealed: bytes) -> bytes:
        (self.folder / "sealed").write_bytes(sealed)
        try:
            open_file(self.folder / "sealed", self.folder / "opened", self.opener)
        except SealError:
            assert not (self.folder / "opened").exists()
            raise
        return (self.folder / "opened").read_bytes()


def pair_at(folder: Path, suite: str | None = None) -> Pair:
    new_pair(folder / "key.pem", suite=suite)
    save_recipient(folder / "key.pem", folder / "public.pem")
    return Pair(folder, load_recipient(folder / "public.pem"), load_opener(folder / "key.pem"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair_at(tmp_path_factory.mktemp("pair"))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seal, "CHUNK_BYTES", CHUNK)


@pytest.mark.parametrize("suite", [HYBRID, CLASSIC])
@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7])
def test_what_is_sealed_comes_out_as_it_was(tmp_path: Path, suite: str, size: int) -> None:
    pair, content = pair_at(tmp_path, suite), bytes(range(256)) * 20
    sealed = pair.seal(content[:size], "said in the open")
    assert pair.open(sealed) == content[:size]
    found = open_file(tmp_path / "sealed", tmp_path / "opened", pair.opener)
    assert found.sha256 == hashlib.sha256(content[:size]).hexdigest()
    assert found.header.statement == "said in the open"
    assert found.header.suite == suite
    assert (tmp_path / "opened").stat().st_mode & 0o777 == 0o600
    assert content[:size] not in sealed or size < 8


def test_the_digest_it_returns_is_that_of_the_sealed_file(pair: Pair) -> None:
    (pair.folder / "plain").write_bytes(b"words")
    found = seal_file(pair.folder / "plain", pair.folder / "sealed", pair.recipient)
    assert found == hashlib.sha256((pair.folder / "sealed").read_bytes()).hexdigest()


def test_sealed_twice_nothing_tells_that_it_is_the_same(pair: Pair) -> None:
    one, two = (pair.seal(b"the same words" * 50)[-716:] for _ in range(2))
    assert not any(one[at : at + 4] == two[at : at + 4] for at in range(712))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_any_byte_changed_anywhere_opens_nothing(pair: Pair, data: st.DataObject) -> None:
    sealed = bytearray(pair.seal(bytes(2 * CHUNK + 5), "statement"))
    place = data.draw(st.integers(0, len(sealed) - 1))
    sealed[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(SealError):
        pair.open(bytes(sealed))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_bytes_that_are_cut_off_or_added_are_noticed(pair: Pair, data: st.DataObject) -> None:
    sealed = pair.seal(bytes(2 * CHUNK + 5))
    end = data.draw(st.integers(0, len(sealed) - 1))
    for spoiled in (sealed[:end], sealed + sealed[end:]):
        with pytest.raises(SealError):
            pair.open(spoiled)


@settings(max_examples=300, deadline=None)
@given(raw=st.binary(max_size=400))
def test_foreign_bytes_are_refused_and_never_crash(pair: Pair, raw: bytes) -> None:
    for start in (b"", seal.MAGIC, seal.MAGIC + len(raw).to_bytes(4, "big")):
        with pytest.raises(SealError):
            pair.open(start + raw)


def _chunks(sealed: bytes) -> tuple[bytes, list[bytes]]:
    """Head, and the three chunks of a file of three whole ones."""
    step = CHUNK + TAG_BYTES
    head = sealed[: len(sealed) - 3 * step]
    return head, [sealed[len(head) + n * step : len(head) + (n + 1) * step] for n in range(3)]


def test_chunks_have_their_place_and_their_file(pair: Pair) -> None:
    head, (a, b, c) = _chunks(pair.seal(b"1" * 3 * CHUNK))
    other_head, (x, _, _) = _chunks(pair.seal(b"2" * 3 * CHUNK))
    assert pair.open(head + a + b + c) == b"1" * 3 * CHUNK
    for wrong in (b + a + c, a + a + c, a + b + b, x + b + c):
        with pytest.raises(SealError, match="not as it was sealed"):
            pair.open(head + wrong)
    with pytest.raises(SealError):
        pair.open(other_head + a + b + c)


def _with_header(sealed: bytes, **changes: object) -> bytes:
    length = int.from_bytes(sealed[6:10], "big")
    raw = canonical({**json.loads(sealed[10 : 10 + length]), **changes})
    return sealed[:6] + len(raw).to_bytes(4, "big") + raw + sealed[10 + length :]


def test_a_file_cut_at_a_chunk_is_no_shorter_file(pair: Pair) -> None:
    head, (a, b, _) = _chunks(pair.seal(b"1" * 3 * CHUNK))
    with pytest.raises(SealError):
        pair.open(_with_header(head + a + b, size_bytes=2 * CHUNK))


def test_what_is_said_in_the_open_cannot_be_exchanged(pair: Pair) -> None:
    sealed = pair.seal(b"words", "by st-mary")
    assert pair.open(_with_header(sealed)) == b"words"
    for changes in ({"statement": "by mallory"}, {"suite": CLASSIC}, {"more": "x"}):
        with pytest.raises(SealError):
            pair.open(_with_header(sealed, **changes))


def test_only_the_recipient_opens_it(pair: Pair, tmp_path: Path) -> None:
    other, sealed = pair_at(tmp_path), pair.seal(b"words")
    with pytest.raises(SealError, match=r"fusion-worker\.pem"):
        other.open(sealed)
    with pytest.raises(SealError, match="does not open it"):
        other.open(_with_header(sealed, recipient=other.recipient.kid))


def test_a_header_that_claims_much_is_not_read(pair: Pair) -> None:
    with pytest.raises(SealError, match="header of"):
        pair.open(seal.MAGIC + (MAX_HEADER_BYTES + 1).to_bytes(4, "big") + b"x")
    with pytest.raises(SealError, match="wanted at most"):
        pair.seal(b"words", '"' * 32 * 1024)  # each is two bytes of JSON


def test_anybody_reads_the_header_and_hears_of_a_short_file(pair: Pair) -> None:
    sealed = pair.seal(b"words", "said")
    assert read_header(pair.folder / "sealed").statement == "said"
    (pair.folder / "sealed").write_bytes(sealed[:-1])
    with pytest.raises(SealError, match="whole"):
        read_header(pair.folder / "sealed")


def test_a_key_is_kept_for_its_owner_and_never_overwritten(tmp_path: Path) -> None:
    pair_at(tmp_path)
    with pytest.raises(FileExistsError):
        new_pair(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_opener(tmp_path / "key.pem")
    for text in ("", "no key", (tmp_path / "public.pem").read_text() * 2):
        (tmp_path / "odd.pem").write_text(text)
        with pytest.raises(KeyFileError):
            load_recipient(tmp_path / "odd.pem")


_FLAT = """
import resource, sys
from pathlib import Path
from trust.seal import open_file, seal_file
from trust.seal_keys import load_opener, load_recipient
folder = Path(sys.argv[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
seal_file(folder / "plain", folder / "sealed", load_recipient(folder / "public.pem"))
open_file(folder / "sealed", folder / "opened", load_opener(folder / "key.pem"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    pair_at(tmp_path)
    with (tmp_path / "plain").open("wb") as file:
        file.truncate(120_000_000)
    made = subprocess.run(
        [sys.executable, "-c", _FLAT, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(made.stdout) * 1024 < 40_000_000
