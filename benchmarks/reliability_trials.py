"""Crash a recorded life at every change, and fail its changes one by one; check what is left."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any, Final

from benchmarks.reliability_disk import Disk, Tree, write_tree
from benchmarks.reliability_life import live
from benchmarks.reliability_promises import broken
from benchmarks.reliability_recorder import Change, Recording, heal, record_call
from coordinator.store_errors import StoreError
from protos.errors import CofuseError
from protos.files import EXIT_DISK_FAILED

NEEDS_ROOM: Final = "cdlrw"
"""Kinds of change that a full disk refuses."""
_GAVE_UP: Final = 75
"""Exit code of a life that ended with an error it told of."""


@dataclass(frozen=True, slots=True)
class State:
    """What a disk may hold after a crash, and what had been promised by then."""

    change: Change
    """The last one."""
    how: str
    tree: Tree
    promises: list[dict[str, Any]]

    def key(self) -> str:
        """The same for states that must pass or fail together."""
        found = hashlib.blake2b(str(len(self.promises)).encode())
        for name, content in sorted(self.tree.items()):
            found.update(f"{name}\0{-1 if content is None else len(content)}\0".encode())
            found.update(content or b"")
        return found.hexdigest()


def states(changes: Sequence[Change], trial: Trial) -> Iterator[State]:
    """Each state after each `every`-th change and after the last."""
    disk, promises = Disk(), list[dict[str, Any]]()
    last = changes[0]
    for change in changes:
        # What is promised between two changes must hold from then on.
        if change.number > last.number and last.number % trial.every == 0:
            yield from _after(disk, last, promises, trial)
        _take(change, disk, promises)
        if change.kind not in "m!?":
            last = change
    yield from _after(disk, last, promises, trial)


def _take(change: Change, disk: Disk, promises: list[dict[str, Any]]) -> None:
    disk.apply(change)
    if change.kind == "m":
        promises.append(json.loads(change.data))


def _after(
    disk: Disk, last: Change, promises: list[dict[str, Any]], trial: Trial
) -> Iterator[State]:
    yield State(last, "everything", disk.everything(), list(promises))
    yield State(last, "synced", disk.synced(), list(promises))
    for mix in range(trial.mixes):
        tree = disk.mixed(Random(f"{trial.seed} {last.number} {mix}"))
        yield State(last, f"mix {mix}", tree, list(promises))


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory where there is one: these disks are made and thrown away by thousands."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


def check(state: State) -> list[str]:
    """Start a coordinator on one state and say what is wrong."""
    with scratch() as home:
        write_tree(state.tree, home)
        try:
            return broken(home, state.promises)
        except Exception as error:  # noqa: BLE001 - that it cannot go on is what we look for
            return [f"does not start or go on: {type(error).__name__}: {error}"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What to try of a recording."""

    every: int
    """Each N-th change; 0: none."""
    mixes: int
    """Per crash."""
    seed: int
    jobs: int
    """Processes that share the work."""
    keep: Path | None = None
    """Folder for the states that fail."""


@dataclass(slots=True)
class Tally:
    """What was tried and found."""

    changes: int = 0
    """Crashed at, or made to fail."""
    states: int = 0
    """Different ones, checked."""
    failures: list[dict[str, Any]] = field(default_factory=list)

    def note(self, change: Change, how: str, says: list[str]) -> None:
        """Count a failure, and show it to whoever watches."""
        where = {"change": change.number, "kind": change.kind, "path": change.path, "state": how}
        self.failures.append({**where, "says": [line[-300:] for line in says[:3]]})
        print(json.dumps(self.failures[-1]), file=sys.stderr)

    def check(self, state: State, trial: Trial) -> None:
        """Start a coordinator on one state, and count what is wrong."""
        self.states += 1
        if says := check(state):
            self.note(state.change, state.how, says)
            if trial.keep:
                folder = trial.keep / f"{state.change.number} {state.how}"
                folder.mkdir(parents=True)
                write_tree(state.tree, folder)


def recorded_life() -> Recording:
    """One life without faults."""
    with scratch() as home:
        recording = record_call(partial(_life, home), home)
    if recording.exit_code:
        raise SystemExit(f"the life itself fails: {recording.output}")
    return recording


def _life(home: Path) -> int:
    live(home)
    return 0


def _life_on_a_full_disk(home: Path) -> int:
    """The life itself waits for room; where it could not even start, it is started again."""
    try:
        live(home, patient=True)
    except (CofuseError, StoreError, OSError):
        heal()
        live(home, patient=True)
    return 0


def _life_on_a_broken_disk(home: Path) -> int:
    try:
        live(home)
    except Exception:  # noqa: BLE001 - it ended because it said that it cannot go on
        traceback.print_exc()
        return _GAVE_UP
    return 0


def crash_everywhere(changes: Sequence[Change], trial: Trial, job: int = 0) -> Tally:
    """Check each state after each `every`-th change; of all jobs together, each state once."""
    tally, seen = Tally(), set[str]()
    for state in states(changes, trial):
        key = state.key()
        tally.changes += state.how == "everything" and state.change.number >= 0 and job == 0
        if key not in seen and int(key, 16) % trial.jobs == job:
            seen.add(key)
            tally.check(state, trial)
    return tally


def fail_everywhere(changes: Sequence[Change], trial: Trial, job: int = 0) -> Tally:
    """Make each `every`-th change fail, for want of room and by a fault of the disk.

    A full disk is said, and gone on with when there is room; after a fault the program may end.
    Either way what was promised holds, and a new start goes on.
    """
    tally = Tally()
    tried = [change for change in changes if change.number >= 0 and change.kind not in "m?"]
    for change in tried[job * trial.every :: trial.jobs * trial.every]:
        errors = (errno.ENOSPC, errno.EIO) if change.kind in NEEDS_ROOM else (errno.EIO,)
        tally.changes += 1
        for error in errors:
            _fail(change, error, trial, tally)
    return tally


def _fail(change: Change, error: int, trial: Trial, tally: Tally) -> None:
    life = _life_on_a_full_disk if error == errno.ENOSPC else _life_on_a_broken_disk
    with scratch() as home:
        done = record_call(partial(life, home), home, fail=(change.number, error), timeout_s=60)
    name = errno.errorcode[error]
    if wrong := _wrong_end(done, error):
        tally.note(change, name, [wrong, done.output])
    disk, promises = Disk(), list[dict[str, Any]]()
    for made in done.changes:
        _take(made, disk, promises)
    for state in _after(disk, change, promises, trial):
        tally.check(replace(state, how=f"{name}, {state.how}"), trial)


def kill_everywhere(changes: Sequence[Change], trial: Trial, job: int = 0) -> Tally:
    """Kill the life after each `every`-th change, start another, and let power fail during that.

    What the second one found was in the system's memory perhaps, and not on the disk.
    """
    tally, disk, promises = Tally(), Disk(), list[dict[str, Any]]()
    for change in changes:
        _take(change, disk, promises)
        share, mine = divmod(change.number, trial.every)
        if change.number < 0 or change.kind in "m!?" or mine or share % trial.jobs != job:
            continue
        tally.changes += 1
        random = Random(f"{trial.seed} {change.number}")
        for state in _second_lives(disk, change, promises, random):
            tally.check(state, trial)
    return tally


def _second_lives(
    killed: Disk, last: Change, promises: list[dict[str, Any]], random: Random
) -> Iterator[State]:
    """What power may leave at a promise of the second life, and at its end."""
    with scratch() as home:
        write_tree(killed.everything(), home)
        disk = killed.reopened(home)
        done = record_call(partial(_life, home), home, resumed=True)
    promises = list(promises)
    marks = [at for at, made in enumerate(done.changes) if made.kind == "m"]
    stops = {random.choice(marks), len(done.changes) - 1}
    for at, made in enumerate(done.changes):
        _take(made, disk, promises)
        if at in stops:
            how = f"killed, and power failed after {len(promises)} promises"
            yield State(last, f"{how}, synced", disk.synced(), list(promises))
            yield State(last, f"{how}, mixed", disk.mixed(random), list(promises))


def _wrong_end(done: Recording, error: int) -> str:
    if not any(change.kind == "!" for change in done.changes):
        return ""  # two threads took their turns otherwise, and there was no such change
    if error == errno.ENOSPC:
        return f"found exit code {done.exit_code}, wanted 0" if done.exit_code else ""
    if done.exit_code not in (0, _GAVE_UP, EXIT_DISK_FAILED):
        return f"found exit code {done.exit_code}"
    # SQLite goes on where it writes the same pages again, and after a folder that failed: then the
    # file system's own journal did, which takes no further write. A backup is a command of its own,
    # which ends.
    unsynced = [
        change.path
        for change in done.changes
        if change.kind == "e" and change.path.startswith("data/") and ".sqlite" not in change.path
    ]
    return f"went on after a failed fsync of {unsynced}" if unsynced and not done.exit_code else ""


def in_parallel(
    act: Callable[[Sequence[Change], Trial, int], Tally], changes: Sequence[Change], trial: Trial
) -> Tally:
    """Let `act` share the changes with forks of this process."""
    if not trial.every:
        return Tally()
    if trial.jobs == 1:
        return act(changes, trial, 0)
    with get_context("fork").Pool(trial.jobs) as pool:
        parts = pool.map(partial(act, changes, trial), range(trial.jobs))
    return Tally(
        sum(part.changes for part in parts),
        sum(part.states for part in parts),
        [failure for part in parts for failure in part.failures],
    )
