"""docs/hospital.md is true: its commands run, and say what the page shows."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from typer.main import get_command

from cofuse.cli import app
from participant.egress import EgressLog

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs" / "hospital.md").read_text(encoding="utf-8")


def steps() -> list[tuple[str, list[str]]]:
    """Each command, and the lines it shows."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line.removeprefix("$ "), []))
            else:
                found[-1][1].append(line)
    return found


def test_every_command_of_the_page_is_one_of_ours_with_its_options() -> None:
    calls = [shlex.split(command)[1:] for command, _ in steps() if command.startswith("cofuse ")]
    assert len(calls) >= 8
    for words in calls:
        command: Any = get_command(app)
        rest = list(words)
        while hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        command.make_context(" ".join(words), rest)


@pytest.mark.slow
def test_the_whole_page_runs(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('{"text": "A note."}\n', encoding="utf-8")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    for command, shows in steps():
        if command == "cofuse approve st-mary":
            _as_if_it_had_run(tmp_path / "st-mary")
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        said = (done.stdout + done.stderr).splitlines()
        assert done.returncode == 0, (command, said)
        for line in shows:
            wanted = re.compile(".*".join(re.escape(part) for part in line.split("...")))
            assert any(wanted.fullmatch(one) for one in said) or line == "...", (command, said)


def _as_if_it_had_run(home: Path) -> None:
    """A policy that ruled, one release, one refusal."""
    log = EgressLog(home / "data", "st-mary")
    log.policy(hashlib.sha256((home / "policy.toml").read_bytes()).hexdigest())
    log.append(round_id="rnd-1", what="logits", size_bytes=1000, sha256="0" * 64, rule="allow 1")
    log.refuse(round_id="rnd-2", what="weights", why="no rule allows weights")
    log.close()
