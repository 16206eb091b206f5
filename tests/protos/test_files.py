"""A growing file holds what was written to it, whatever the chunks' sizes and the file system."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import files
from protos.files import GrowingFile

BLOCK = 4096
SIZES = st.lists(
    st.one_of(
        st.integers(1, 3 * BLOCK),
        st.sampled_from((BLOCK, 4 * BLOCK, 64 * BLOCK, 64 * BLOCK + 1)),
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=40)
@given(sizes=SIZES, cut=st.integers(0, 6), seed=st.integers(0, 255))
def test_it_holds_what_was_written_also_when_opened_again(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], cut: int, seed: int
) -> None:
    path = tmp_path_factory.mktemp("growing") / "file"
    chunks = [bytes((seed + n + i) % 251 for i in range(size)) for n, size in enumerate(sizes)]
    at = 0
    for part in (chunks[:cut], chunks[cut:]):
        with GrowingFile(path) as file:
            for chunk in part:
                file.write_at(at, chunk)
                at += len(chunk)
            file.sync()
    assert path.read_bytes() == b"".join(chunks)


def test_what_another_wrote_beyond_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3 * BLOCK)
    with GrowingFile(path) as file:
        file.write_at(0, b"y" * BLOCK)
        file.truncate(BLOCK)
    assert path.read_bytes() == b"y" * BLOCK


@pytest.mark.parametrize("refused_at", ["open", "write", "short"])
def test_a_file_system_without_direct_writes_takes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused_at: str
) -> None:
    real_open, real_write = os.open, os.pwrite
    direct: set[int] = set()

    def refusing_open(path: Path, flags: int, mode: int = 0o777) -> int:
        wants = bool(flags & os.O_DIRECT)
        if wants and refused_at == "open":
            raise OSError(errno.EINVAL, "no direct writes here")
        handle = real_open(path, flags, mode)
        if wants:
            direct.add(handle)
        return handle

    def refusing_write(handle: int, data: bytes, offset: int) -> int:
        if handle in direct and refused_at == "write":
            raise OSError(errno.EINVAL, "larger blocks, please")
        if handle in direct and refused_at == "short":
            return real_write(handle, data[:BLOCK], offset)
        return real_write(handle, data, offset)

    monkeypatch.setattr(files.os, "open", refusing_open)
    monkeypatch.setattr(files.os, "pwrite", refusing_write)
    content = os.urandom(5 * BLOCK + 7)
    with GrowingFile(tmp_path / "file") as file:
        file.write_at(0, content[: 4 * BLOCK])
        file.write_at(4 * BLOCK, content[4 * BLOCK :])
    assert (tmp_path / "file").read_bytes() == content


def test_a_failing_disk_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(_handle: int, _data: bytes, _offset: int) -> int:
        raise OSError(errno.EIO, "input/output error")

    with GrowingFile(tmp_path / "file") as file:
        monkeypatch.setattr(files.os, "pwrite", failing)
        with pytest.raises(OSError, match="input/output"):
            file.write_at(0, bytes(BLOCK))
