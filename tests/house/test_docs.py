"""docs/operator.md is true: its commands run, and its tables name what there is."""

import ast
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from typer.main import get_command

from cofuse.cli import app
from coordinator.config import CoordinatorConfig
from coordinator.figures import Figures
from coordinator.store import Store
from trust.ca import create_authority

ROOT: Final = Path(__file__).parents[2]
GUIDE: Final = ROOT / "docs" / "operator.md"
PORTS: Final = ("7443", "9443", "7442")
ROOT_PROGRAMS: Final = frozenset({"python3", "pip", "uv", "useradd", "install", "systemctl"})
"""What a `sh` block may hold: it is not run."""


@dataclass(frozen=True)
class Step:
    """One command of the page, and the lines of output it shows."""

    command: str
    shows: tuple[str, ...]


def _blocks(kind: str) -> list[str]:
    text = GUIDE.read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _steps() -> list[Step]:
    found: list[Step] = []
    for line in "".join(_blocks("console")).splitlines():
        if line.startswith("$ "):
            found.append(Step(line.removeprefix("$ "), ()))
        else:
            found[-1] = Step(found[-1].command, (*found[-1].shows, line))
    return found


def _cofuse_calls(command: str) -> list[list[str]]:
    """The words of every `cofuse ...` in a shell line, up to a pipe, a redirection or an end."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    calls: list[list[str]] = []
    open_call = False
    for word in lexer:
        if word == "cofuse":
            calls.append([])
            open_call = True
        elif set(word) <= set("();<>|&"):
            open_call = False
        elif open_call:
            calls[-1].append(word)
    # A file descriptor before a redirection (2>&1) reads as a word of its own.
    return [[w for w in words if w not in ("1", "2")] for words in calls]


def test_every_command_of_the_page_is_one_of_ours_with_its_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COFUSE_AT", "127.0.0.1:7443")
    calls = [call for step in _steps() for call in _cofuse_calls(step.command)]
    assert len(calls) > 15
    for words in calls:
        command: Any = get_command(app)
        rest = list(words)
        while hasattr(command, "commands"):
            assert rest[0] in command.commands, words
            command = command.commands[rest.pop(0)]
        command.make_context(" ".join(words), rest)


def test_blocks_that_are_not_run_hold_only_what_needs_root_or_the_network() -> None:
    for line in "".join(_blocks("sh")).splitlines():
        assert Path(line.split()[0]).name in ROOT_PROGRAMS, line


def test_the_page_names_every_metric_with_its_labels(tmp_path: Path) -> None:
    create_authority(tmp_path / "ca", "test")
    figures = Figures(
        Store.at(tmp_path / "store.sqlite"), tmp_path, {"a": tmp_path / "ca" / "ca.pem"}, dict
    )
    families = text_string_to_metric_families(figures.text().decode())
    there = {f.name + "_total" * (f.type == "counter") for f in families}
    ours = {name for name in there if name.startswith("fed_") and not name.endswith("_created")}
    rows = re.findall(r"^\| `(fed_\w+)", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(ours)
    rules = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
    for rule in rules["groups"][0]["rules"]:
        for name in re.findall(r"fed_\w+", rule["expr"]):
            assert re.sub(r"_(count|sum|bucket)$", "", name) in ours, rule["alert"]


def test_the_page_names_every_key_of_the_configuration() -> None:
    table = GUIDE.read_text(encoding="utf-8").partition("## coordinator.toml")[2]
    rows = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    assert sorted(rows) == sorted(CoordinatorConfig.model_fields)


def test_the_page_names_every_event_of_the_coordinators_log() -> None:
    text = GUIDE.read_text(encoding="utf-8")
    codes = set()
    for path in ROOT.glob("coordinator/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and re.fullmatch(
                r"(coordinator|health|rpc)\.[a-z]+", str(node.value)
            ):
                codes.add(str(node.value))
    files = {f"coordinator.{path.stem}" for path in ROOT.glob("coordinator/*.py")}
    for code in codes - files - {"coordinator.sqlite", "coordinator.toml"}:
        assert f"`{code}`" in text, code


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_page_runs(tmp_path: Path) -> None:
    """From nothing to a lost disk, in one shell; only the ports are others."""
    from tests.integration.test_journey import _write_texts

    _write_texts(tmp_path)
    steps = _steps()
    ports = dict(zip(PORTS, _free_ports(), strict=True))
    output = _run(tmp_path, [_with_ports(step.command, ports) for step in steps])
    assert len(output) == len(steps), f"{steps[len(output) - 1].command}\n{output[-1]}"
    for step, said in zip(steps, output, strict=False):
        rest = said.splitlines()
        for line in step.shows:
            wanted = re.compile(".*".join(re.escape(part) for part in line.split("...")))
            fits = [i for i, found in enumerate(rest) if wanted.fullmatch(found)]
            assert fits, f"{step.command}\nshows {line!r}, and said:\n{said}"
            rest = rest[fits[0] + 1 :]


def _run(folder: Path, commands: list[str]) -> list[str]:
    """What each command said, up to the first that failed."""
    lines = ["trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT"]
    for command in commands:
        lines += [f"echo @@{len(lines)}", command, "status=$?", "[ $status = 0 ] || exit $status"]
    (folder / "commands.sh").write_text("\n".join([*lines, "echo @@end"]), encoding="utf-8")
    with (folder / "said").open("w") as said:
        subprocess.run(
            ["bash", "-m", "commands.sh"],
            cwd=folder,
            stdout=said,
            stderr=subprocess.STDOUT,
            check=False,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "PYTHONPATH": str(ROOT),
            },
        )
    _, *parts = re.split(r"^@@\w+\n", (folder / "said").read_text(), flags=re.MULTILINE)
    return parts[: len(commands)]


def _with_ports(command: str, ports: dict[str, str]) -> str:
    """The command on ports that are free here; `init` would take the page's own."""
    if "coordinator init" in command:
        options = zip(("listen", "engine-listen", "ops-listen"), PORTS, strict=True)
        command += "".join(f" --{name} 127.0.0.1:{port}" for name, port in options)
    for port, free in ports.items():
        command = command.replace(f":{port}", f":{free}")
    return command


def _free_ports() -> list[str]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    found = [str(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return found
