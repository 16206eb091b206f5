"""What can be proved of trust, in figures: calls, parsers, and what became of invented patients.

    python benchmarks/reliability_proofs.py [--short] [--json]

rpc_matrix: every call under every role and state of a certificate. fuzz: spoiled inputs to every
parser of foreign bytes. phi_hits: places where a planted patient was found after a whole round:
0, or a promise is broken. The first and the last are figures that tests have recorded.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.fuzz import spoil  # noqa: E402

MATRIX: Final = "tests/integration/test_rpc_matrix.py"
PATIENTS: Final = "tests/integration/test_federation.py"


def recorded(tests: str, minutes: float) -> Counter[str]:
    """Run tests; return the sums of the figures that they recorded."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-p",
                "no:cacheprovider",
                f"--junitxml={report}",
                tests,
            ],
            cwd=ROOT,
            stdout=sys.stderr,
            timeout=minutes * 60,
            check=False,
        )
        found: Counter[str] = Counter()
        for one in ElementTree.parse(report).getroot().iter("property"):
            found[str(one.get("name"))] += int(str(one.get("value")))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; exit 1 when a promise does not hold, or was not looked at."""
    parser = argparse.ArgumentParser(description="What can be proved of trust, in figures.")
    parser.add_argument("--short", action="store_true", help="few inputs, and no round")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(argv)
    matrix = recorded(MATRIX, minutes=5)
    found: dict[str, Any] = {
        "rpc_matrix": {"cases": matrix["cases"], "failures": matrix["failures"]},
    }
    with tempfile.TemporaryDirectory() as keep:
        tallies = spoil([], 200 if arguments.short else 10_000, Path(keep))
    found["fuzz"] = {
        name: {key: tally.figures()[key] for key in ("inputs", "crashes", "max_ms")}
        for name, tally in tallies.items()
    }
    bad = matrix["failures"] > 0 or matrix["cases"] == 0
    bad |= any(tally.crashes for tally in tallies.values())
    if not arguments.short:
        patients = recorded(PATIENTS, minutes=12)
        if "bytes_searched" in patients:
            found["phi_hits"] = patients["phi_hits"]
        bad |= found.get("phi_hits") != 0
    print(json.dumps(found) if arguments.json else json.dumps(found, indent=1))
    return int(bad)


if __name__ == "__main__":
    raise SystemExit(main())
