"""Crash a coordinator at every write, with power or without, and see what it has after a restart.

    python benchmarks/reliability_crash.py --json

One life (reliability_life.py) is recorded, change by change. For each change the folder is made
again as a disk may hold it after a crash at that moment: all that was written (the process was
killed), only what was synced (power failed), and seeded mixes of both with torn writes. On each the
coordinator starts, its invariants and every promise given before are checked, and it goes on to the
end. With `--faults` every change is also made to fail, by a full disk and by a broken one.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import hashlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, Final

# Run as a script, this file's own folder comes first.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reliability_disk import Disk, Tree, write_tree
from benchmarks.reliability_life import broken, live
from benchmarks.reliability_recorder import Change, Recording, load_recorder, record_call

_SHOWN: Final = 20
_GAVE_UP: Final = 75
"""Exit code of a life that ended with an error it told of."""
EXIT_DISK_FAILED: Final = 74


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


def states(changes: Sequence[Change], *, every: int, mixes: int, seed: int) -> Iterator[State]:
    """Each state after each `every`-th change and after the last."""
    disk, promises = Disk(), list[dict[str, Any]]()
    last = changes[0]
    for change in [*changes, None]:
        # What was promised between two changes must hold from then on.
        if (change is None or change.number > last.number) and last.number % every == 0:
            yield from _after(disk, last, promises, mixes, seed)
        if change is None:
            return
        disk.apply(change)
        if change.kind == "m":
            promises.append(json.loads(change.data))
        last = change if change.kind not in "m!?" else last


def _after(
    disk: Disk, last: Change, promises: list[dict[str, Any]], mixes: int, seed: int
) -> Iterator[State]:
    yield State(last, "everything", disk.everything(), list(promises))
    yield State(last, "synced", disk.synced(), list(promises))
    for mix in range(mixes):
        tree = disk.mixed(Random(f"{seed} {last.number} {mix}"))
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


@dataclass(slots=True)
class Tally:
    """What was tried and found."""

    changes: int = 0
    """Crashed at, or made to fail."""
    states: int = 0
    """Different ones, checked."""
    failures: list[dict[str, Any]] = field(default_factory=list)

    def note(self, change: Change, how: str, says: list[str]) -> None:
        """Count a failure, and show it to who watches."""
        where = {"change": change.number, "kind": change.kind, "path": change.path, "state": how}
        self.failures.append({**where, "says": says})
        if len(self.failures) <= _SHOWN:
            print(json.dumps(self.failures[-1]), file=sys.stderr)


def recorded_life() -> Recording:
    """One life without faults."""
    with scratch() as home:
        recording = record_call(partial(_life, home, patient=False), home)
    if recording.exit_code:
        raise SystemExit(f"the life itself fails: {recording.output}")
    return recording


def _life(home: Path, *, patient: bool) -> int:
    try:
        live(home, patient=patient)
    except Exception:
        if patient:
            raise
        traceback.print_exc()  # it ended because it said that it cannot go on
        return _GAVE_UP
    return 0


def crash_everywhere(recording: Recording, *, every: int, mixes: int, seed: int) -> Tally:
    """Check each state after each `every`-th change."""
    tally, seen = Tally(), set[str]()
    for state in states(recording.changes, every=every, mixes=mixes, seed=seed):
        tally.changes += state.how == "everything"
        if (key := state.key()) not in seen:
            seen.add(key)
            tally.states += 1
            if says := check(state):
                tally.note(state.change, state.how, says)
    return tally


def fail_everywhere(recording: Recording, *, every: int, mixes: int, seed: int) -> Tally:
    """Make each `every`-th change fail, for want of room and by a fault of the disk.

    A full disk is said, and gone on with when there is room; after a fault the program may end.
    Either way what was promised holds, and a new start goes on.
    """
    tally = Tally()
    for change in recording.changes:
        if change.number < 0 or change.number % every or change.kind in "m!?":
            continue
        for error in (errno.ENOSPC, errno.EIO):
            if error == errno.ENOSPC and change.kind not in "cdlrw":
                continue
            tally.changes += 1
            with scratch() as home:
                life = partial(_life, home, patient=error == errno.ENOSPC)
                done = record_call(life, home, fail=(change.number, error), timeout_s=60)
            name = errno.errorcode[error]
            if wrong := _wrong_end(done, error):
                tally.note(change, name, [wrong, done.output[-2000:]])
            for state in list(states(done.changes, every=1, mixes=mixes, seed=seed))[-2 - mixes :]:
                tally.states += 1
                if says := check(state):
                    tally.note(change, f"{name}, {state.how}", says)
    return tally


def _wrong_end(done: Recording, error: int) -> str:
    failed = {change.data for change in done.changes if change.kind == "!"}
    if not failed:
        return ""  # two threads took their turns otherwise, and there was no such change
    if error == errno.ENOSPC:
        return f"found exit code {done.exit_code}, wanted 0" if done.exit_code else ""
    if done.exit_code not in (0, _GAVE_UP, EXIT_DISK_FAILED):
        return f"found exit code {done.exit_code}"
    if b"f" in failed and not done.exit_code:
        return "went on after a failed fsync"
    return ""


def report(tally: Tally, seconds: float) -> dict[str, Any]:
    """What is printed."""
    return {
        "write_ops_crashed": tally.changes,
        "states_checked": tally.states,
        "invariant_failures": len(tally.failures),
        "failures": tally.failures[:_SHOWN],
        "seconds": round(seconds, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found, as one line of JSON with --json; 1 when something is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON only")
    parser.add_argument("--every", type=int, default=1, help="try each N-th change only")
    parser.add_argument("--mixes", type=int, default=3, help="seeded mixes per crash")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", action="store_true", help="fail changes instead of crashing")
    parser.add_argument("--at", type=int, help="with --keep: the change to crash at")
    parser.add_argument("--state", default="synced", help="everything, synced or 'mix N'")
    parser.add_argument("--keep", type=Path, help="write the state of --at into this new folder")
    given = parser.parse_args(arguments)
    load_recorder()
    begun = time.perf_counter()
    recording = recorded_life()
    if given.keep:
        found = states(recording.changes, every=1, mixes=given.mixes, seed=given.seed)
        state = next(s for s in found if (s.change.number, s.how) == (given.at, given.state))
        given.keep.mkdir(parents=True)
        write_tree(state.tree, given.keep)
        print(state.change.kind, state.change.path, *check(state), sep="\n")
        return 0
    act = fail_everywhere if given.faults else crash_everywhere
    tally = act(recording, every=given.every, mixes=given.mixes, seed=given.seed)
    found_all = report(tally, time.perf_counter() - begun)
    if given.json:
        print(json.dumps(found_all))
    else:
        print(*(f"{key}: {value}" for key, value in found_all.items()), sep="\n")
    return int(bool(tally.failures))


if __name__ == "__main__":
    raise SystemExit(main())
