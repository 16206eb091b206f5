"""What may be on a disk after a crash and what must: the model, and the recorder that feeds it."""

import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.reliability_disk import (
    SECTOR_BYTES,
    CannotReplayError,
    Disk,
    Tree,
    read_tree,
    write_tree,
)
from benchmarks.reliability_recorder import (
    Change,
    RecorderError,
    Recording,
    build_recorder,
    record,
)

try:
    build_recorder()
    _REFUSAL = ""
except RecorderError as error:
    _REFUSAL = str(error)
recorded = pytest.mark.skipif(bool(_REFUSAL), reason=_REFUSAL)

# Files a to c in folders x and y, each change one of the system's calls.
PLAY = """
import os, random, sqlite3, shutil, sys
root, seed, count = sys.argv[1], *map(int, sys.argv[2:])
os.chdir(root)
rnd = random.Random(seed)
names = [f + n for f in ("", "x/", "y/") for n in "abc"]
for folder in "xy":
    os.mkdir(folder)
def new(): return rnd.randbytes(rnd.choice((1, 511, 512, 700, 5000)))
def there(): return rnd.choice([n for n in names if os.path.exists(n)])
def spare(): return rnd.choice(names + ["x/d"])
def make():
    with open(rnd.choice(names), rnd.choice(("wb", "ab")), buffering=0) as file:
        file.write(new())
def at(call):
    def do():
        handle = os.open(there(), os.O_RDWR)
        try: call(handle)
        finally: os.close(handle)
    return do
CALLS = [make, at(lambda h: os.pwrite(h, new(), rnd.randrange(6000))),
    at(lambda h: os.writev(h, [new(), new()])), at(lambda h: os.ftruncate(h, rnd.randrange(6000))),
    at(lambda h: os.pwritev(h, [new(), b"", new()], rnd.randrange(6000))),
    at(os.fsync), at(os.fdatasync), lambda: os.truncate(there(), 100),
    lambda: os.rename(there(), spare()), lambda: os.replace(there(), os.path.abspath(spare())),
    lambda: os.unlink(there()), lambda: shutil.copyfile(there(), "y/copy"),
    lambda: os.path.exists("y/l") or os.link(there(), "y/l")]
for _ in range(count):
    if not any(os.path.exists(n) for n in names): make()
    try: rnd.choice(CALLS)()
    except shutil.SameFileError: pass
make()
folder = os.open("x", os.O_RDONLY)
os.rename(there(), "e", dst_dir_fd=folder)
os.mkdir("z"); os.rmdir("z"); os.makedirs("u/v"); open("u/v/w", "w").close(); shutil.rmtree("u")
db = sqlite3.connect("y/base"); db.execute("pragma journal_mode=wal")
with db: db.execute("create table t(a)")
with db: db.executemany("insert into t values (?)", [(n * "a",) for n in range(200)])
if seed % 2: os._exit(0)  # else SQLite closes: its log goes into the database, and away
"""


def play(
    text: str, folder: Path, *arguments: int, fail: tuple[int, int] | None = None
) -> Recording:
    command = [sys.executable, "-c", text, str(folder), *map(str, arguments)]
    return record(command, folder, fail=fail)


def replayed(changes: Sequence[Change]) -> Disk:
    disk = Disk()
    for change in changes:
        disk.apply(change)
    return disk


def without_shared_memory(tree: Tree) -> Tree:
    return {name: content for name, content in tree.items() if not name.endswith("-shm")}


@recorded
@pytest.mark.parametrize("seed", range(4))
def test_replaying_all_changes_gives_the_real_folder_byte_for_byte(
    tmp_path: Path, seed: int
) -> None:
    done = play(PLAY, tmp_path, seed, 60 * seed)
    assert done.exit_code == 0, done.output
    found = replayed(done.changes).everything()
    assert without_shared_memory(found) == without_shared_memory(read_tree(tmp_path))
    assert "y/base" in found
    assert ("y/base-wal" in found) == (seed % 2 == 1)
    numbers = [change.number for change in done.changes if change.kind not in "m?"]
    assert numbers == list(range(-1, len(numbers) - 1))


@recorded
def test_a_file_that_writes_go_around_is_refused(tmp_path: Path) -> None:
    text = """
import mmap, os, sys
handle = os.open(sys.argv[1] + "/a", os.O_RDWR | os.O_CREAT)
os.ftruncate(handle, 4096)
mmap.mmap(handle, 4096)[0] = 1
"""
    changes = play(text, tmp_path).changes
    with pytest.raises(CannotReplayError, match="a: "):
        replayed(changes)


@recorded
def test_marks_keep_their_place_and_children_are_left_alone(tmp_path: Path) -> None:
    text = """
import subprocess, sys
sys.path.insert(0, sys.argv[2])
from benchmarks.reliability_recorder import mark
open(sys.argv[1] + "/a", "w").write("1")
mark("between")
subprocess.run(["touch", sys.argv[1] + "/../elsewhere"], check=True)
open(sys.argv[1] + "/b", "w")
"""
    (folder := tmp_path / "root").mkdir()
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", text, str(folder), str(root)]
    done = record(command, folder)
    assert [change.kind for change in done.changes] == ["d", "c", "w", "m", "c"], done.output
    assert done.changes[3].data == b"between"


FILL = """
import os, sys
sys.path.insert(0, sys.argv[2])
from benchmarks.reliability_recorder import heal
handle = os.open(sys.argv[1] + "/a", os.O_RDWR | os.O_CREAT)
for number in range(9):
    try:
        print(os.write(handle, b"x" * 10))
    except OSError as error:
        print(error.errno)
    if number == 6: heal()
    try:
        os.fsync(handle)
    except OSError as error:
        print("sync", error.errno)
"""


@recorded
def test_a_full_disk_takes_half_a_write_and_then_none_until_there_is_room(tmp_path: Path) -> None:
    (folder := tmp_path / "root").mkdir()
    command = [sys.executable, "-c", FILL, str(folder), str(Path(__file__).parents[2])]
    # change 0 makes the file, then each turn is a write and a sync
    done = record(command, folder, fail=(5, errno.ENOSPC))
    full = str(errno.ENOSPC)
    assert done.output.split() == ["10", "10", "5", *[full] * 4, "10", "10"]
    assert replayed(done.changes).everything() == read_tree(folder) == {"a": b"x" * 45}


@recorded
def test_what_a_failed_sync_left_behind_is_not_saved_by_the_next_one(tmp_path: Path) -> None:
    (folder := tmp_path / "root").mkdir()
    command = [sys.executable, "-c", FILL, str(folder), str(Path(__file__).parents[2])]
    done = record(command, folder, fail=(4, errno.EIO))
    assert done.output.split() == ["10", "10", "sync", str(errno.EIO), *["10"] * 7]
    disk = replayed([*done.changes, Change(kind="f", file=done.changes[0].file)])
    assert disk.everything() == {"a": b"x" * 90}
    assert disk.synced() == {"a": b"x" * 10 + bytes(10) + b"x" * 70}


# --- the model alone ---------------------------------------------------------------------------

ROOT, FOLDER, FILE, OTHER = 1, 2, 3, 4
START = [
    Change(kind="d", file=ROOT),
    Change(kind="d", file=FOLDER, path="x"),
    Change(kind="c", file=FILE, path="a"),
    Change(kind="c", file=OTHER, path="x/b"),
]
SYNC_ALL = [Change(kind="f", file=file) for file in (ROOT, FOLDER, FILE, OTHER)]
writes = st.builds(
    Change,
    kind=st.just("w"),
    file=st.sampled_from([FILE, OTHER]),
    offset=st.integers(0, 3000),
    data=st.integers(1, 255).flatmap(
        lambda value: st.integers(1, 1500).map(lambda n: bytes([value]) * n)
    ),
)
cuts = st.builds(
    Change, kind=st.just("t"), file=st.sampled_from([FILE, OTHER]), offset=st.integers(0, 3000)
)
syncs = st.sampled_from([*SYNC_ALL, Change(kind="s")])
changes_of_bytes = st.lists(writes | cuts | syncs, max_size=12)
randoms = st.integers(0, 10**9).map(Random)


@given(changes_of_bytes, randoms)
def test_what_was_synced_survives_whatever_the_disk_keeps(
    changes: list[Change], random: Random
) -> None:
    disk = replayed([*START, *changes, *SYNC_ALL])
    assert disk.mixed(random) == disk.synced() == disk.everything()


@given(changes_of_bytes, writes, randoms)
def test_a_torn_write_holds_old_and_new_sectors_only(
    changes: list[Change], last: Change, random: Random
) -> None:
    disk = replayed([*START, *changes, *SYNC_ALL])
    old = disk.synced()
    disk.apply(last)
    new, found = disk.everything(), disk.mixed(random)
    for name in ("a", "x/b"):
        # A file that grew in part is shorter, or has zeros where nothing came.
        longest = max(len(old[name] or b""), len(new[name] or b""))
        before, after, now = (
            (tree[name] or b"").ljust(longest, b"\0") for tree in (old, new, found)
        )
        for at in range(0, longest, SECTOR_BYTES):
            part = slice(at, at + SECTOR_BYTES)
            assert now[part] in (before[part], after[part])


def outcomes(changes: list[Change]) -> set[tuple[str, ...]]:
    disk = replayed(changes)
    return {tuple(sorted(disk.mixed(Random(seed)))) for seed in range(200)}


def test_a_new_name_is_there_for_certain_only_after_its_folder_was_synced() -> None:
    synced_bytes = [*START, *SYNC_ALL[2:]]
    assert replayed(synced_bytes).synced() == {}
    assert replayed([*synced_bytes, SYNC_ALL[0]]).synced() == {"a": b"", "x": None}
    assert outcomes(synced_bytes) == {
        (),
        ("a",),
        ("x",),
        ("a", "x"),
        ("x", "x/b"),
        ("a", "x", "x/b"),
    }


def test_a_rename_without_a_sync_may_or_may_not_have_happened_and_is_never_half() -> None:
    within = Change(kind="r", file=FILE, path="a", other="c")
    over = [Change(kind="c", file=9, path="c"), Change(kind="f", file=ROOT)]
    assert outcomes([*START, *SYNC_ALL, within]) == {("a", "x", "x/b"), ("c", "x", "x/b")}
    written = Change(kind="w", file=FILE, data=b"new")
    disk = replayed([*START, written, *over, *SYNC_ALL, within])
    assert {disk.mixed(Random(seed)).get("c") for seed in range(99)} == {b"", b"new"}


def test_a_file_that_moves_to_another_folder_is_never_lost() -> None:
    moves = [*START, *SYNC_ALL, Change(kind="r", file=FILE, path="a", other="x/a")]
    both = ("a", "x", "x/a", "x/b")
    assert outcomes(moves) == {("a", "x", "x/b"), ("x", "x/a", "x/b"), both}
    for folder in (ROOT, FOLDER):
        synced = replayed([*moves, Change(kind="f", file=folder)]).synced()
        assert "x/a" in synced
        assert ("a" in synced) == (folder == FOLDER)


def test_a_removed_file_may_come_back_until_its_folder_is_synced() -> None:
    removed = [*START, *SYNC_ALL, Change(kind="u", file=FILE, path="a")]
    assert outcomes(removed) == {("a", "x", "x/b"), ("x", "x/b")}
    assert outcomes([*removed, SYNC_ALL[0]]) == {("x", "x/b")}


def test_what_a_killed_process_left_is_no_safer_for_being_found(tmp_path: Path) -> None:
    killed = replayed([*START, *SYNC_ALL, Change(kind="w", file=FILE, data=b"1")])
    write_tree(killed.everything(), tmp_path)
    disk = killed.reopened(tmp_path)
    inode = (tmp_path / "a").stat().st_ino
    disk.apply(Change(kind="w", file=inode, offset=1, data=b"2"))
    assert disk.everything()["a"] == b"12"
    assert disk.synced()["a"] == killed.synced()["a"] == b""
    disk.apply(Change(kind="f", file=inode))
    assert disk.synced()["a"] == b"12"
    assert killed.everything()["a"] == b"1"


def test_a_tree_is_written_as_it_is_read(tmp_path: Path) -> None:
    tree = {"x": None, "x/b": b"1", "a": b"", "x/y": None, "x/y/c": bytes(600)}
    write_tree(tree, tmp_path)
    assert read_tree(tmp_path) == tree
