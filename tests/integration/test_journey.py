"""The three users' way from nothing to a pivot, through the command line alone."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cofuse.cli import app
from cofuse.demo.corpora import Limits, departments
from fusion.models import ModelSpec, build_model, save_model, train_tokenizer
from protos.public_sets import write_prompts
from tests.cofuse.envelope import told

pytestmark = pytest.mark.timeout(300)
_SMALL = """
[model]
architecture = "gpt_neox"
hidden_size = 64
layers = 1
heads = 2
vocab_size = 400

[training]
steps = 6
batch_size = 2
seq_len = 32
warmup_steps = 1
"""


class Shell:
    """Runs cofuse in a folder, and ends what it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []

    def run(self, *words: str, status: int = 0) -> str:
        """Run to the end, in this process: twenty interpreters would take half a minute."""
        with chdir(self.folder):
            done = CliRunner().invoke(app, words)
        assert done.exit_code == status, (done.stderr, done.exception)
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done.stdout if status == 0 else done.stderr

    def start(self, *words: str) -> "subprocess.Popen[str]":
        """Leave it running; wait for its first line."""
        process = subprocess.Popen(
            [sys.executable, "-m", "cofuse.cli", *words],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline()
        return process


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    made = Shell(tmp_path)
    yield made
    for process in reversed(made.started):
        process.send_signal(signal.SIGTERM)
    for process in made.started:
        process.wait(20)
        assert process.returncode == 0


def test_from_nothing_to_a_pivot(shell: Shell) -> None:
    folder = shell.folder
    _write_texts(folder)
    ports = _free_port(), _free_port()
    at = f"127.0.0.1:{ports[0]}"

    # The operator.
    shell.run(
        "coordinator", "init", "hub",
        "--listen", at, "--engine-listen", f"127.0.0.1:{ports[1]}",
        "--ops-listen", "127.0.0.1:0",
    )  # fmt: skip
    shell.run("coordinator", "init", "hub", status=2)  # an authority is never overwritten
    for role, name in (("operator", "grace"), ("researcher", "ada")):
        shell.run("identity", role, "--role", role, "--name", name)
        _admit(shell, Path(role), role, name)
    shell.start("coordinator", "up", "hub")
    operator = ("--at", at, "--identity", "operator")
    researcher = ("--at", at, "--identity", "researcher")
    shell.run("pivot", "push", "pivot-0", "base", *operator)

    # The institution.
    corpus = ("--corpus", "private.jsonl")
    shell.run("participant", "init", "st-mary", "--name", "st-mary", "--coordinator", at, *corpus)
    config = folder / "st-mary" / "participant.toml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text[: text.index("[model]")] + _SMALL + text[text.index("[tls]") :])
    _admit(shell, Path("st-mary"), "participant", "st-mary")
    shell.start("participant", "up", "st-mary")

    # The researcher. The policy still says no to everything, and that is heard.
    assert "valid logits round" in shell.run("round", "check", "round.yaml")
    refused = shell.run("round", "submit", "round.yaml", *researcher).strip()
    shell.run("round", "approve", refused, *researcher, status=4)
    shell.run("round", "approve", refused, *operator)
    shell.run("round", "watch", refused, *researcher, status=1)
    assert "no rule allows logits" in shell.run("round", "show", refused, *researcher)

    # The institution changes its mind; the next round goes through.
    shell.started[-1].send_signal(signal.SIGTERM)
    assert shell.started[-1].wait(20) == 0
    policy = folder / "st-mary" / "policy.toml"
    text = policy.read_text().replace("kinds = []", 'kinds = ["logits"]')
    policy.write_text(text.replace('approval = "manual"', 'approval = "auto"'))
    shell.start("participant", "up", "st-mary")
    accepted = shell.run("round", "submit", "round.yaml", *researcher).strip()
    shell.run("round", "approve", accepted, *operator)
    final = told(shell.run("round", "watch", accepted, *researcher, "--json"))
    assert (final["state"], final["pivot"]) == ("PUBLISHED", "pivot-1")
    shell.run("pivot", "pull", "pivot-1", *researcher)
    assert (folder / "pivot-1" / "model.safetensors").exists()
    assert "pivot-1" in shell.run("pivot", "ls", *researcher)
    left = told(shell.run("participant", "egress", "st-mary", "--json"))
    kinds = [line["what"] for line in left["releases"]]
    assert kinds == ["report", "logits", "report"]  # the refusal itself is a release too


def test_a_command_without_its_files_says_what_is_missing(shell: Shell) -> None:
    error = shell.run("round", "ls", "--at", "127.0.0.1:1", "--identity", "nowhere", status=2)
    assert "nowhere/key.pem: no such file" in error
    error = shell.run("round", "check", "none.yaml", status=2)
    assert "none.yaml: cannot be read" in error
    error = shell.run("demo", "--rounds", "everything", status=2)
    assert "logits-unified" in error


def _admit(shell: Shell, home: Path, role: str, name: str) -> None:
    request = str(home / "request.csr")
    pem = shell.run("coordinator", "sign", "hub", request, "--role", role, "--name", name)
    (shell.folder / home / "certificate.pem").write_text(pem)
    for public in (shell.folder / "hub" / "ca").glob("*.pem"):
        (shell.folder / home / public.name).write_bytes(public.read_bytes())


def _write_texts(folder: Path) -> None:
    limits = Limits(private=4000, public=1500, heldout=1000, questions=2)
    department = departments(["cardiology"], 0, limits=limits, source="sample")[0]
    write_prompts(folder / "private.jsonl", department.private)
    write_prompts(folder / "prompts.jsonl", department.public)
    tokenizer = train_tokenizer(department.public, 350)
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    save_model(build_model(spec, 0), tokenizer, folder / "base")
    values: dict[str, Any] = {
        "name": "first",
        "pivot": "pivot-0",
        "participants": ["st-mary"],
        "kind": "logits",
        "method": "unified",
        "prompts": "prompts.jsonl",
        "training": {"steps": 2, "lr": 0.001, "seq_len": 32, "batch_size": 2},
    }
    (folder / "round.yaml").write_text(json.dumps(values), encoding="utf-8")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
