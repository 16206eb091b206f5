"""Files that survive a power cut: what these report done is on disk, whole."""

import errno
import logging
import mmap
import os
from pathlib import Path
from typing import Final, NoReturn

_LOG = logging.getLogger(__name__)
EXIT_DISK_FAILED: Final = 74
"""sysexits' EX_IOERR: the supervisor starts us again, and what is on disk is checked anew."""
_BLOCK_BYTES: Final = 4096
"""Of disks and of memory: what goes past the page cache starts and ends at one."""
NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def sync_handle(handle: int) -> None:
    """Bring an open file's bytes to disk, or end the process.

    After a failed fsync Linux forgets which pages were not written, and the next fsync says all is
    well: nothing that this process believes about the file is true any more.
    Raises: OSError for a full disk only.
    """
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno in NO_ROOM:
            raise
        _disk_failed(error)


def sync(path: Path) -> None:
    """Bring a file's bytes, or a directory's names, to disk. Raises and ends as sync_handle."""
    handle = os.open(path, os.O_RDONLY)
    try:
        sync_handle(handle)
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """Bring a file's bytes, or a folder's names, to disk, for a caller who answers for a failure.

    Raises: OSError.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, where they are not there; their names are then on disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def settle(folder: Path) -> None:
    """Make `folder`; bring to disk what a killed process may have left in the system's memory.

    A new process would believe what it finds there, and promise it to others; a power cut could
    still take it away.
    """
    make_folder(folder)
    os.sync()


def replace(source: Path, final: Path) -> None:
    """Give `source` its final name, bytes first: `final` is the old file or the new, never half."""
    sync(source)
    source.replace(final)
    sync(final.parent)


class GrowingFile:
    """A file that is written chunk by chunk; whole blocks go past the page cache, where they may.

    Through the cache, a gigabyte costs up to two seconds of a core and other programs' cached
    files, and its fsync comes late and long (`dd bs=1M conv=fsync` on one machine: 0.4 to 1.7 GB/s;
    with `oflag=direct` 1.8 GB/s and 0.15 s of a core).
    """

    def __init__(self, path: Path) -> None:
        """Open for writing, and make it where it is not there; what it holds stays."""
        self._handle = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
        self._direct = _open_direct(path, os.O_WRONLY)
        self._blocks = mmap.mmap(-1, _BLOCK_BYTES)  # the kernel wants memory that starts a page

    def write_at(self, offset_bytes: int, data: bytes) -> None:
        """Write all of `data` at an offset. Raises: OSError."""
        view = memoryview(data)
        if offset_bytes % _BLOCK_BYTES == 0:
            done = self._write_blocks(offset_bytes, view[: len(view) & -_BLOCK_BYTES])
            offset_bytes, view = offset_bytes + done, view[done:]
        write_at(self._handle, offset_bytes, view)

    def _write_blocks(self, offset_bytes: int, whole: memoryview) -> int:
        """Write as many bytes as go past the cache; return how many."""
        if self._direct is None or not whole:
            return 0
        if len(self._blocks) < len(whole):
            self._blocks = mmap.mmap(-1, len(whole))
        self._blocks[: len(whole)] = whole
        try:
            with memoryview(self._blocks) as blocks:
                done = os.pwrite(self._direct, blocks[: len(whole)], offset_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:  # larger blocks than ours, or none after all
                raise
            os.close(self._direct)
            self._direct = None
            return 0
        return done

    def sync(self) -> None:
        """Bring what was written to disk. Raises and ends as sync_handle."""
        sync_handle(self._handle)

    def truncate(self, length_bytes: int) -> None:
        """Cut off what lies beyond."""
        os.ftruncate(self._handle, length_bytes)

    def close(self) -> None:
        """Close; nothing is brought to disk by it."""
        for handle in (self._handle, self._direct):
            if handle is not None:
                os.close(handle)

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()


class Reading:
    """A file that is read chunk by chunk, past the page cache where that is asked for and possible.

    See GrowingFile for what that saves.
    """

    def __init__(self, path: Path, *, past_cache: bool) -> None:
        self._handle = os.open(path, os.O_RDONLY)
        self._direct = _open_direct(path, os.O_RDONLY) if past_cache else None
        self._blocks = mmap.mmap(-1, _BLOCK_BYTES)

    def read_at(self, offset_bytes: int, length_bytes: int) -> bytes:
        """Read up to so many bytes; none at the end of the file. Raises: OSError."""
        if self._direct is None or (offset_bytes | length_bytes) % _BLOCK_BYTES:
            return os.pread(self._handle, length_bytes, offset_bytes)
        if len(self._blocks) < length_bytes:
            self._blocks = mmap.mmap(-1, length_bytes)
        with memoryview(self._blocks) as blocks:
            try:
                found = os.preadv(self._direct, [blocks[:length_bytes]], offset_bytes)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return os.pread(self._handle, length_bytes, offset_bytes)
            return bytes(blocks[:found])

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in (self._handle, self._direct):
            if handle is not None:
                os.close(handle)


def _open_direct(path: Path, mode: int) -> int | None:
    """A handle that goes past the page cache; None where system or file system has none."""
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, mode | os.O_DIRECT)
    except OSError:
        return None


def write_at(handle: int, offset_bytes: int, data: bytes | memoryview) -> None:
    """Write all of `data` at an offset: one pwrite may take less. Raises: OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset_bytes)
        offset_bytes += written
        view = view[written:]


def _disk_failed(error: OSError) -> NoReturn:
    _LOG.critical("fsync failed (%s): check the disk; ending, to start from what is on it", error)
    os._exit(EXIT_DISK_FAILED)
