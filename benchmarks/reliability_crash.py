"""Crash a coordinator at every write, with power or without, and see what it has after a restart.

    python benchmarks/reliability_crash.py --json

One life (reliability_life.py) is recorded, change by change. For each change the folder is made
again as a disk may hold it after a crash at that moment: all that was written (the process was
killed), only what was synced (power failed), and seeded mixes of both with torn writes. On each the
coordinator starts, its invariants and every promise given before are checked, and it goes on to the
end. Then each change is the last before a kill, and power fails in the life that follows; and each
is made to fail, by a full disk and by a broken one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

# Run as a script, this file's own folder comes first.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reliability_recorder import load_recorder
from benchmarks.reliability_trials import (
    Trial,
    crash_everywhere,
    fail_everywhere,
    in_parallel,
    kill_everywhere,
    recorded_life,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was found, with --json as one line of JSON; 1 when something is broken."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one line of JSON only")
    parser.add_argument("--every", type=int, default=1, help="crash at each N-th change; 0: none")
    parser.add_argument(
        "--kills", type=int, default=1, help="kill at each N-th, then crash; 0: none"
    )
    parser.add_argument("--faults", type=int, default=1, help="fail each N-th change; 0: none")
    parser.add_argument("--mixes", type=int, default=3, help="seeded mixes per crash")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="new folder for the states that fail")
    given = parser.parse_args(arguments)
    load_recorder()
    begun = time.perf_counter()
    recording = recorded_life()
    common = Trial(
        every=given.every, mixes=given.mixes, seed=given.seed, jobs=given.jobs, keep=given.keep
    )
    few = min(given.mixes, 1)
    crashed = in_parallel(crash_everywhere, recording.changes, common)
    killed = in_parallel(kill_everywhere, recording.changes, replace(common, every=given.kills))
    failing = replace(common, every=given.faults, mixes=few)
    failed = in_parallel(fail_everywhere, recording.changes, failing)
    tallies = (crashed, killed, failed)
    report = {
        "write_ops": recording.changes[-1].number + 1,
        "write_ops_crashed": crashed.changes,
        "write_ops_killed_twice": killed.changes,
        "write_ops_failed": failed.changes,
        "states_checked": sum(tally.states for tally in tallies),
        "promises": sum(change.kind == "m" for change in recording.changes),
        "invariant_failures": sum(len(tally.failures) for tally in tallies),
        "seconds": round(time.perf_counter() - begun, 1),
    }
    lines = (f"{key}: {value}" for key, value in report.items())
    print(json.dumps(report) if given.json else "\n".join(lines))
    return int(report["invariant_failures"] > 0)


if __name__ == "__main__":
    raise SystemExit(main())
