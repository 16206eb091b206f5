"""Files that survive a power cut: keys, heads of chains, what was seen before."""

import os
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_new(path: Path, content: bytes, mode: int) -> None:
    """Write a file that must not be there yet, and bring its bytes, not its name, to disk.

    Raises: FileExistsError.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_with(path: Path, content: bytes, mode: int) -> None:
    """Give a file new content: after a crash there is the old one or the new one, whole."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    write_new(draft, content, mode)
    draft.replace(path)
    sync_folder(path.parent)
