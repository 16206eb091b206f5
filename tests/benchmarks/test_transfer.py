"""The benchmark of transfers runs, and says what the page about it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "transfer.py"


@pytest.mark.slow
def test_a_gigabyte_grows_the_coordinator_by_64_mib_at_most() -> None:
    command = [sys.executable, str(SCRIPT), "--json", "--turns", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    found = json.loads(done.stdout)
    assert {"ratio_raw", "rss_growth_mib", "mb_per_s"} <= set(found)
    assert found["rss_growth_mib"] <= 64
