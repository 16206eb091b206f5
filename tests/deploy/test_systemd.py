"""The units: valid, closed to what they do not need, and in step with the programs."""

import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from typer.main import get_command

from cofuse.cli import app
from coordinator.config import CoordinatorConfig
from coordinator.health import EVERY_S, STALE_S

UNITS = sorted((Path(__file__).parents[2] / "deploy" / "systemd").glob("*.service"))
_ANALYZE = shutil.which("systemd-analyze")
_CLOSED = {
    "NoNewPrivileges": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "yes",
    "PrivateTmp": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes",
    "ProtectClock": "yes",
    "ProtectProc": "invisible",
    "RestrictNamespaces": "yes",
    "RestrictSUIDSGID": "yes",
    "RestrictRealtime": "yes",
    "LockPersonality": "yes",
    "CapabilityBoundingSet": "",
    "SystemCallArchitectures": "native",
    "RestrictAddressFamilies": "AF_INET AF_INET6 AF_UNIX",
    "UMask": "0077",
    "StateDirectoryMode": "0700",
}
_DIFFERS = {
    # Trainer and guard each move to a network namespace of their own (participant/sandbox.py).
    "cofuse-participant": {"RestrictNamespaces": "user net"}
}
needs_systemd = pytest.mark.skipif(_ANALYZE is None, reason="systemd-analyze is not here")


def _keys(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for line in unit.read_text(encoding="utf-8").splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found[key].append(value)
    return found


def _installed(unit: Path, tmp_path: Path) -> Path:
    """The unit with a program that exists here: systemd looks for it."""
    text = unit.read_text(encoding="utf-8").replace("/opt/cofuse/bin/cofuse", sys.executable)
    copy = tmp_path / unit.name
    copy.write_text(text, encoding="utf-8")
    return copy


def test_there_is_a_unit_for_each_program() -> None:
    assert [unit.stem for unit in UNITS] == ["cofuse-coordinator", "cofuse-participant"]


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_takes_the_unit_without_a_word(unit: Path, tmp_path: Path) -> None:
    assert _ANALYZE is not None
    done = subprocess.run(
        [_ANALYZE, "verify", "--man=no", str(_installed(unit, tmp_path))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_calls_the_unit_closed(unit: Path, tmp_path: Path) -> None:
    """Exposure of at most 2.0 on systemd's scale from 0 to 10; an open service has 9.6."""
    assert _ANALYZE is not None
    path = str(_installed(unit, tmp_path))
    done = subprocess.run(
        [_ANALYZE, "security", "--offline=yes", "--no-pager", "--threshold=20", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_what_a_unit_closes_stays_closed(unit: Path) -> None:
    keys = _keys(unit)
    closed = _CLOSED | _DIFFERS.get(unit.stem, {})
    assert {key: keys[key] for key in closed} == {key: [v] for key, v in closed.items()}
    assert keys["SystemCallFilter"][0] == "@system-service"
    assert "~@privileged" in keys["SystemCallFilter"]
    assert keys["User"] == keys["Group"] == keys["StateDirectory"] == [unit.stem]
    assert keys["Restart"] == ["always"]


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_command_of_a_unit_is_one_of_ours(unit: Path) -> None:
    _, group, name, home = _keys(unit)["ExecStart"][0].split()
    groups = get_command(app).commands  # type: ignore[attr-defined]
    assert name in groups[group].commands
    assert home == f"/var/lib/{unit.stem}"


def test_the_times_of_the_coordinators_unit_fit_the_program() -> None:
    keys = _keys(UNITS[0])
    longest_drain_s = next(
        m.le for m in CoordinatorConfig.model_fields["drain_seconds"].metadata if hasattr(m, "le")
    )
    assert keys["Type"] == ["notify"]  # protos/systemd.py tells
    assert int(keys["TimeoutStopSec"][0]) > longest_drain_s + 10
    assert int(keys["WatchdogSec"][0]) > EVERY_S + 2 * STALE_S
