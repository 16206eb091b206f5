"""Promises of the whole coordinator to whoever pulls the plug: what it told is true afterwards."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability_recorder import RecorderError, build_recorder

ROOT = Path(__file__).resolve().parents[2]
try:
    build_recorder()
    _REFUSAL = ""
except RecorderError as error:
    _REFUSAL = str(error)
pytestmark = pytest.mark.skipif(bool(_REFUSAL), reason=_REFUSAL)


def tried(*arguments: str) -> dict[str, Any]:
    """What the benchmark finds; its failures are in the error of the assertion."""
    program = ROOT / "benchmarks" / "reliability_crash.py"
    done = subprocess.run(
        [sys.executable, str(program), "--json", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_some_crashes_and_faults_break_no_promise() -> None:
    found = tried(
        "--every", "131", "--mixes", "1", "--kills", "400", "--faults", "400", "--jobs", "1"
    )
    assert found["invariant_failures"] == 0
    assert found["write_ops_crashed"] >= 5
    assert min(found["write_ops_killed_twice"], found["write_ops_failed"]) >= 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_crash_and_no_fault_breaks_a_promise() -> None:
    found = tried()
    assert found["invariant_failures"] == 0
    assert found["write_ops_crashed"] == found["write_ops_killed_twice"] == found["write_ops"]
    assert found["write_ops_failed"] == found["write_ops"]
