"""Everything that may go wrong, on purpose: `make reliability`, within 40 minutes on two cores.

    python benchmarks/reliability.py [--short] [--only PART ...] [--add] [--out reliability.json]

Each part is a program of its own under benchmarks/ (or a set of tests), with a time limit; a part
that fails or runs over leaves its figures out, and the reason in. `canary` and `poisoning` train
models for minutes and run when they are named: `--only canary poisoning --add` puts their figures
beside those that the file holds of the same commit. The table goes to stderr, the figures to the
file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

ROOT: Final = Path(__file__).resolve().parents[1]
WORDS: Final = 400
"""Last characters of a failed part's output that are kept."""
TESTS: Final = (
    "tests/integration/test_transfer_chaos.py",
    "tests/coordinator/test_clock.py",
    "tests/coordinator/test_scheduler.py",
    "tests/coordinator/test_artifacts.py",
)
"""Stalls, slow links, flipped bits; clock jumps; a full disk: what has no figure holds or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One program, what it is told, and for how long it may run."""

    program: str
    arguments: tuple[str, ...]
    short: tuple[str, ...]
    """Its arguments in the short form."""
    minutes: float
    why: str
    apart: bool = False
    """It runs only when it is named."""


PARTS: Final = {
    "uploads": Part(
        program="benchmarks/reliability_uploads.py",
        arguments=("--mib", "1024", "--cuts", "50"),
        short=("--mib", "32", "--cuts", "3"),
        minutes=4,
        why="an upload that is cut many times",
    ),
    "crash": Part(
        program="benchmarks/reliability_crash.py",
        arguments=("--faults", "0"),
        short=("--every", "40", "--kills", "0", "--faults", "0", "--mixes", "1"),
        minutes=8,
        why="a crash at every write, unsynced data dropped",
    ),
    "faults": Part(
        program="benchmarks/reliability_crash.py",
        arguments=("--every", "0", "--kills", "0"),
        short=("--every", "0", "--kills", "0", "--faults", "80"),
        minutes=8,
        why="no space, or a failing disk, at a write",
    ),
    "many": Part(
        program="benchmarks/reliability_many.py",
        arguments=("--participants", "100", "300", "1000", "--window", "40"),
        short=("--participants", "12", "--window", "4"),
        minutes=14,
        why="many participants attend, and one round names them all",
    ),
    "kills": Part(
        program="benchmarks/reliability_kills.py",
        arguments=("--kills", "300", "--gap", "1.5", "--minutes", "13"),
        short=("--kills", "4", "--gap", "1", "--minutes", "0.4", "--deadline", "0.5"),
        minutes=17,
        why="kill -9 at random while rounds run",
    ),
    "proofs": Part(
        program="benchmarks/reliability_proofs.py",
        arguments=(),
        short=("--short",),
        minutes=20,
        why="who may call what, parsers under fire, invented patients searched for",
    ),
    "canary": Part(
        program="benchmarks/canary.py",
        arguments=("--seeds", "2"),
        short=("--seeds", "1"),
        minutes=30,
        why="an over-fitted expert's release is stopped, a usual one's is not",
        apart=True,
    ),
    "poisoning": Part(
        program="benchmarks/poisoning.py",
        arguments=(),
        short=("--attacks", "shuffle"),
        minutes=60,
        why="one of five participants poisons",
        apart=True,
    ),
}
KEYS: Final = (
    "kills",
    "lost_receipts",
    "double_fused",
    "half_pivots",
    "ready_seconds_max",
    "write_ops_crashed",
    "invariant_failures",
    "upload_cuts",
    "resent_chunks_max",
    "participants",
    "rpc_matrix",
    "fuzz",
    "phi_hits",
    "canary",
    "poisoning",
)
"""What reliability.json holds at its top, part by part."""


class PartError(Exception):
    """A part gave no figures; the message holds its last words."""


def run(part: Part, *, short: bool) -> dict[str, Any]:
    """Run one program; return its figures, the last line of its output.

    Raises: PartError. A program that prints figures and exits 1 says that a promise is broken:
        its figures count.
    """
    if not (ROOT / part.program).exists():
        raise PartError(f"{part.program} is not there")
    command = [sys.executable, part.program, *(part.short if short else part.arguments), "--json"]
    output, code = _ended(command, part.minutes)
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            found = json.loads(line)
            assert isinstance(found, dict)
            return found
    raise PartError(f"ended with status {code}: {output.strip()[-WORDS:]}")


def run_tests(minutes: float) -> dict[str, Any]:
    """Run the tests of what has no figure, the long ones too.

    Raises: PartError when none could be run.
    """
    paths = [path for path in TESTS if (ROOT / path).exists()]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-m",
            "slow or not slow",
            "-p",
            "no:cacheprovider",
        ]
        output, code = _ended([*command, f"--junitxml={report}", *paths], minutes)
        if not report.exists():
            raise PartError(f"ended with status {code}: {output.strip()[-WORDS:]}")
        suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    bad = [case.get("name") for case in suite if any(e.tag in ("failure", "error") for e in case)]
    return {"tests": int(suite.get("tests", 0)), "tests_failed": bad}


def _ended(command: Sequence[str], minutes: float) -> tuple[str, int]:
    """Output and exit status of a program that ends within its time."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=minutes * 60, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise PartError(f"found no end after {minutes} minutes: run it alone") from error
    return done.stdout + ("" if "{" in done.stdout else done.stderr), done.returncode


def commit() -> str:
    """Name the commit of this checkout; "" where a file differs from it, or nobody knows."""
    asked = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
    try:
        head, changed = (
            subprocess.run(
                ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
            ).stdout.strip()
            for words in asked
        )
    except FileNotFoundError:
        return ""
    return "" if changed else head


def kept(path: Path, of: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return a file's figures by part, and what was left out of it; none of a file not there.

    Raises: PartError unless they were measured at the commit `of`.
    """
    if not path.exists():
        return {}, {}
    held = json.loads(path.read_text(encoding="utf-8"))
    if not of or held.get("commit") != of:
        raise PartError(
            f"{path} holds figures of commit {held.get('commit') or 'unknown'}, and this is "
            f"{of or 'a changed checkout'}: measure all of it anew, without --add"
        )
    return held["parts"], held["left_out"]


def table(found: dict[str, dict[str, Any]], left_out: dict[str, str]) -> str:
    """The figures in words, part by part."""
    lines = []
    for name, figures in found.items():
        lines.append(f"{name}: {PARTS[name].why if name in PARTS else 'what holds or not'}")
        sizes = figures.get("participants")
        rest = {key: value for key, value in figures.items() if key != "participants"}
        lines += [f"  {key:<22} {value}" for key, value in rest.items()]
        for size, row in (sizes or {}).items():
            lines += [f"  {size:>5}  {key:<20} {value}" for key, value in row.items()]
    lines += [f"{name}: left out, {reason}" for name, reason in left_out.items()]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; exit 1 when one was left out."""
    parser = argparse.ArgumentParser(description="What a federation survives.")
    parser.add_argument("--short", action="store_true", help="small sizes: a minute or two")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "tests"])
    parser.add_argument("--add", action="store_true", help="keep the file's other figures")
    parser.add_argument("--out", type=Path, default=Path("reliability.json"))
    arguments = parser.parse_args(argv)
    found: dict[str, dict[str, Any]] = {}
    left_out: dict[str, str] = {}
    of = commit()
    if arguments.add:
        try:
            found, left_out = kept(arguments.out, of)
        except PartError as error:
            parser.error(str(error))
    usual = [*(name for name, part in PARTS.items() if not part.apart), "tests"]
    for name in arguments.only or usual:
        found.pop(name, None)
        left_out.pop(name, None)
        began = time.monotonic()
        try:
            if name in PARTS:
                found[name] = run(PARTS[name], short=arguments.short)
            elif not arguments.short:
                found[name] = run_tests(minutes=6)
        except PartError as error:
            left_out[name] = str(error)
        sys.stderr.write(f"{name}: {time.monotonic() - began:.0f} s\n")
    top: dict[str, Any] = {}
    for figures in found.values():
        top = {key: value for key, value in figures.items() if key in KEYS} | top
    failures = [f["invariant_failures"] for f in found.values() if "invariant_failures" in f]
    if failures:
        top["invariant_failures"] = sum(failures)
    figures = {**top, "commit": of, "parts": found, "left_out": left_out}
    text = json.dumps(figures, indent=1)
    arguments.out.write_text(text + "\n", encoding="utf-8")
    sys.stderr.write(table(found, left_out))
    return int(bool(left_out))


if __name__ == "__main__":
    raise SystemExit(main())
