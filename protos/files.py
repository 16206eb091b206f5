"""Files that survive a power cut: what these report done is on disk, whole."""

import errno
import logging
import os
from pathlib import Path
from typing import Final, NoReturn

_LOG = logging.getLogger(__name__)
EXIT_DISK_FAILED: Final = 74
"""sysexits' EX_IOERR: the supervisor starts us again, and what is on disk is checked anew."""
_WRITE_BACK_BYTES: Final = 32 * 1024 * 1024
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


def write_at(handle: int, offset_bytes: int, data: bytes) -> None:
    """Write all of `data` at an offset: one pwrite may take less."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, offset_bytes)
        offset_bytes += written
        view = view[written:]


def write_back(handle: int, before_bytes: int, after_bytes: int) -> None:
    """Each 32 MiB that an open file grows: start writing it back, give up pages that are on disk.

    So neither dirty pages nor other programs' cached files pay for a long transfer, and the fsync
    at its end is short (measured: 1.2 GB/s where plain writes took 0.2 to 1.2).
    """
    grew = before_bytes // _WRITE_BACK_BYTES != after_bytes // _WRITE_BACK_BYTES
    if grew and hasattr(os, "posix_fadvise"):  # not on macOS, where the fsync then takes longer
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)


def _disk_failed(error: OSError) -> NoReturn:
    _LOG.critical("fsync failed (%s): check the disk; ending, to start from what is on it", error)
    os._exit(EXIT_DISK_FAILED)
