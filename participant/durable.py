"""What must survive a power cut: whole files, and the names under which they are found."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from protos.files import flush

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


def write_durably(path: Path, text: str) -> None:
    """Put text at path, whole: after a crash there is the old content or the new one."""
    draft = path.with_name(f".{path.name}.new")
    with draft.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(path)
    flush(path.parent)


def sync_tree(folder: Path) -> None:
    """Sync everything in a folder, and the folder itself."""
    for path in folder.rglob("*"):
        flush(path)
    flush(folder)


def is_full(error: BaseException | None) -> bool:
    """Whether the disk had no room: whoever frees some may let the work go on."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        # torch and safetensors have errors of their own, which quote the system's words.
        if "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_broken(error: BaseException) -> bool:
    """Whether the disk failed: what was written before is in doubt, so the process must end."""
    return isinstance(error, OSError) and error.errno == errno.EIO


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep a second daemon off the folder; a killed one leaves no trace.

    Raises: BlockingIOError naming the cure.
    """
    with (folder / "daemon.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"found another daemon at work in {folder}, wanted none: stop it first, "
                "or give this one a data_dir of its own"
            ) from None
        yield
