"""From a token to the first beat: `cofuse join` and `cofuse up`, and no file goes to and fro."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cofuse.cli import app
from participant.config import load_config
from participant.policy import load_policy
from participant.status import read_status
from tests.integration.test_joining import Hub, hub

__all__ = ["hub"]
pytestmark = pytest.mark.slow


def joined_by_command(hub: Hub, home: Path, name: str) -> Path:
    """One command of the institution's, after which `cofuse up` is the second."""
    notes = home.with_suffix(".jsonl")
    notes.write_text("".join(f'{{"text": "Note {n}: rests well."}}\n' for n in range(40)))
    words = ("join", hub.address, str(hub.invite(name)), str(home), "--corpus", str(notes))
    done = CliRunner().invoke(app, [*words, "--coordinator", hub.running.address])
    assert done.exit_code == 0, done.stderr
    return home


def test_one_command_joins_and_lays_the_folder_out(hub: Hub, tmp_path: Path) -> None:
    home = joined_by_command(hub, tmp_path / "st-lucy", "st-lucy")
    config = load_config(home / "participant.toml")
    assert (config.name, config.coordinator) == ("st-lucy", hub.running.address)
    assert load_policy(config.policy).allow[0].kinds == (), "nothing leaves before a person edits"
    wrong = CliRunner().invoke(
        app,
        ["join", hub.address, str(hub.invite("st-lucy")), str(tmp_path / "b"), "--corpus", "none"],
    )
    assert wrong.exit_code == 2
    assert not (tmp_path / "b").exists(), "a wrong corpus costs no token"


def test_two_commands_from_a_token_to_the_first_beat(hub: Hub, tmp_path: Path) -> None:
    home = joined_by_command(hub, tmp_path / "st-vera", "st-vera")
    began = time.monotonic()
    words = [sys.executable, "-m", "cofuse.cli", "up", str(home)]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as daemon:
        try:
            heard = threading.Event()
            while not ((home.joinpath("data").is_dir() and read_status(home / "data")) or {}).get(
                "attending"
            ):
                assert daemon.poll() is None, daemon.stderr and daemon.stderr.read()
                assert time.monotonic() - began < 200, "the goal is 60 s; this machine may be busy"
                heard.wait(0.2)
        finally:
            daemon.terminate()
