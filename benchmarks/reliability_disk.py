"""What a disk may hold after a crash, told from the changes a program made (a model).

A change is in the system's memory at once, and on the disk for certain when it was synced: bytes
by fsync of their file, names by fsync of their folder. In between, the disk may hold any part of
what is not synced, in any order, and of a write any of its 512-byte sectors. That is less than
common file systems promise and what POSIX does: a program that survives it survives those too.

Kept are only: a rename within a folder is there or not, never half; one from folder to folder may
leave both names, never none; a folder's changes are single names. Times, owners and modes are left
out, and a hole in a file reads as zeros, never as somebody's old bytes.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final, TypeAlias

from benchmarks.reliability_recorder import Change

SECTOR_BYTES: Final = 512
Tree: TypeAlias = Mapping[str, bytes | None]
"""Files by path with their bytes; folders with None."""


class CannotReplayError(Exception):
    """The program changed the folder in a way that the recorder cannot see."""


@dataclass(eq=False)
class _File:
    written: bytearray = field(default_factory=bytearray)
    durable: bytearray = field(default_factory=bytearray)
    unsynced: list[Change] = field(default_factory=list)


@dataclass(eq=False)
class _Folder:
    written: dict[str, "_Node"] = field(default_factory=dict)
    durable: dict[str, "_Node"] = field(default_factory=dict)


_Node: TypeAlias = _File | _Folder


@dataclass(eq=False)
class _Names:
    """A change of a folder that is there whole or not at all; None takes a name away."""

    folder: _Folder
    nodes: Mapping[str, _Node | None]
    after: "_Names | None" = None
    """Without this one it cannot be there: a file that moves has one name at least."""
    durable: bool = False

    def put_into(self, entries: dict[str, _Node]) -> None:
        for name, node in self.nodes.items():
            if node is None:
                entries.pop(name, None)
            else:
                entries[name] = node


class Disk:
    """One folder on a disk. Feed it a recording's changes; ask at any point what may be there."""

    def __init__(self) -> None:
        self._root = _Folder()
        self._nodes: dict[int, _Node] = {}
        self._unsynced: list[_Names] = []
        """Of all folders, in order."""

    def apply(self, change: Change) -> None:
        """Take the next change.

        Raises: CannotReplayError.
        """
        match change.kind:
            case "c":
                self._make(change, _File())
            case "d":
                self._make(change, _Folder() if change.path else self._root)
            case "w" | "t":
                file = self._file(change)
                _put(file.written, change)
                file.unsynced.append(change)
            case "r" | "l" | "u":
                self._rename(change)
            case "f" | "e":
                self._sync(self._nodes[change.file], failed=change.kind == "e")
            case "s":
                for node in self._nodes.values():
                    self._sync(node)
            # SQLite's index of its log lives in shared memory; the first to open it makes it anew.
            case "?" if not change.path.endswith("-shm"):
                raise CannotReplayError(f"{change.path}: changed by a call that is not recorded")

    def everything(self) -> Tree:
        """What other programs see, and what is left when this one is killed."""
        return _tree(self._root, lambda folder: folder.written, lambda file: bytes(file.written))

    def synced(self) -> Tree:
        """The least that is left when power fails."""
        return _tree(self._root, lambda folder: folder.durable, lambda file: bytes(file.durable))

    def mixed(self, random: Random) -> Tree:
        """One of the many that may be left when power fails."""
        share = random.choice((0.1, 0.5, 0.9))  # some crashes keep nearly all, some nearly nothing
        kept: set[_Names] = set()
        for names in self._unsynced:
            possible = names.after is None or names.after.durable or names.after in kept
            if possible and random.random() < share:
                kept.add(names)
        files: dict[int, bytes] = {}

        def entries(folder: _Folder) -> Mapping[str, _Node]:
            found = dict(folder.durable)
            for names in self._unsynced:
                if names.folder is folder and names in kept:
                    names.put_into(found)
            return found

        def content(file: _File) -> bytes:
            if id(file) not in files:  # of two names of one file, both show the same
                files[id(file)] = _torn(file, share, random)
            return files[id(file)]

        return _tree(self._root, entries, content)

    def reopened(self, folder: Path) -> "Disk":
        """A copy that goes on in `folder`, which holds everything(): a process was killed.

        What it had not synced still is not, though the next process finds it.
        """
        disk = copy.deepcopy(self)
        disk._nodes = {folder.lstat().st_ino: disk._root}

        def visit(node: _Folder, at: Path) -> None:
            for name, child in node.written.items():
                disk._nodes[(at / name).lstat().st_ino] = child
                if isinstance(child, _Folder):
                    visit(child, at / name)

        visit(disk._root, folder)
        return disk

    def _make(self, change: Change, node: _Node) -> None:
        self._nodes[change.file] = node
        if change.path:
            folder, name = self._place(change.path)
            self._change(folder, {name: node})

    def _rename(self, change: Change) -> None:
        folder, name = self._place(change.path)
        if change.kind == "u":
            self._change(folder, {name: None})
            return
        node = folder.written[name]
        target, new_name = self._place(change.other)
        if change.kind == "l":
            self._change(target, {new_name: node})
        elif folder is target:
            self._change(folder, {name: None, new_name: node})
        else:
            added = self._change(target, {new_name: node})
            self._change(folder, {name: None}, after=added)

    def _change(
        self, folder: _Folder, nodes: Mapping[str, _Node | None], after: _Names | None = None
    ) -> _Names:
        names = _Names(folder, nodes, after)
        names.put_into(folder.written)
        self._unsynced.append(names)
        return names

    def _place(self, path: str) -> tuple[_Folder, str]:
        *parents, name = path.split("/")
        node: _Node = self._root
        for parent in parents:
            assert isinstance(node, _Folder)
            node = node.written[parent]
        assert isinstance(node, _Folder)
        return node, name

    def _file(self, change: Change) -> _File:
        node = self._nodes.get(change.file)
        if not isinstance(node, _File):
            raise CannotReplayError(f"inode {change.file}: its making was not recorded")
        return node

    def _sync(self, node: _Node, *, failed: bool = False) -> None:
        if isinstance(node, _Folder):
            for names in list(self._unsynced):
                if names.folder is node and not failed:
                    self._keep(names)
            return
        if not failed:
            for change in node.unsynced:
                _put(node.durable, change)
        # After a failed sync the system calls its pages clean: no later one writes them.
        node.unsynced.clear()

    def _keep(self, names: _Names) -> None:
        if names.durable:
            return
        if names.after is not None:
            self._keep(names.after)
        names.put_into(names.folder.durable)
        names.durable = True
        self._unsynced.remove(names)


def _put(content: bytearray, change: Change) -> None:
    if change.kind == "t":
        del content[change.offset :]
    if len(content) < change.offset:
        content.extend(bytes(change.offset - len(content)))
    if change.kind == "w":
        content[change.offset : change.offset + len(change.data)] = change.data


def _torn(file: _File, share: float, random: Random) -> bytes:
    content = bytearray(file.durable)
    for change in file.unsynced:
        whole = random.random()
        if whole < share / 2 or (change.kind == "t" and whole < share):
            _put(content, change)
        elif whole < (1 + share) / 2:
            for sector in _sectors(change):
                if random.random() < share:
                    _put(content, sector)
    return bytes(content)


def _sectors(change: Change) -> Iterable[Change]:
    """The parts of a write that a disk takes whole."""
    start, end = change.offset, change.offset + len(change.data)
    while start < end:
        cut = min(end, (start // SECTOR_BYTES + 1) * SECTOR_BYTES)
        data = change.data[start - change.offset : cut - change.offset]
        yield Change(kind="w", offset=start, data=data)
        start = cut


def _tree(
    root: _Folder,
    entries: Callable[[_Folder], Mapping[str, _Node]],
    content: Callable[[_File], bytes],
) -> Tree:
    found: dict[str, bytes | None] = {}

    def visit(folder: _Folder, prefix: str) -> None:
        for name, node in entries(folder).items():
            if isinstance(node, _File):
                found[prefix + name] = content(node)
            else:
                found[prefix + name] = None
                visit(node, f"{prefix}{name}/")

    visit(root, "")
    return found


def write_tree(tree: Tree, folder: Path) -> None:
    """Make the files and folders of `tree` below an empty folder."""
    for name, content in tree.items():  # a folder comes before what is in it
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)


def read_tree(folder: Path) -> Tree:
    """What really lies below a folder."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }
