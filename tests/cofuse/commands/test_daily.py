"""Promises of the daily verbs: they find their folder, and leaving is for good."""

import json
import re
import time
from datetime import datetime
from pathlib import Path

import pytest

from cofuse.commands.reference import MODELS
from participant.status import paused
from protos.tls import TlsFiles
from tests.cofuse.command_line import run
from tests.cofuse.envelope import told


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "notes.jsonl").write_text('{"text": "Patient 1 rests well."}\n')
    site = tmp_path / "site"
    words = ("--name", "st-anna", "--coordinator", "hub:1", "--corpus", tmp_path / "notes.jsonl")
    assert run("participant", "init", site, *words)[0] == 0
    return site


def test_pause_and_resume_find_the_folder_they_are_said_in(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("pause")[0] == 2
    monkeypatch.chdir(home)
    assert run("pause")[0] == 0
    assert (home / "data" / "paused").exists()
    status = run("status", "--json")
    assert (status[0], json.loads(status[1])["error"]["code"]) == (1, "not_running")
    assert json.loads(status[1])["data"] == {"paused": True}
    assert told(run("resume", "--json")[1]) == {"ok": True, "paused": False}
    assert not (home / "data" / "paused").exists()


def test_a_pause_ends_by_itself_when_that_was_said(home: Path) -> None:
    before = time.time() * 1000
    until = json.loads(run("pause", home, "--until", "90m", "--json")[1])["data"]["until"]
    end = datetime.fromisoformat(until).timestamp() * 1000
    assert 0 <= end - before - 90 * 60_000 < 60_000
    pause = paused(home / "data")
    assert pause is not None
    assert abs(pause.until_unix_ms - end) <= 1
    assert paused(home / "data", int(end) + 1) is None
    code, _, words = run("pause", home, "--until", "yesterday")
    assert code == 2
    assert "wanted 08:00" in words
    run("pause", home)
    assert paused(home / "data", 2**60) is not None, "without a time, only resume ends it"


def test_leaving_destroys_the_key_and_nothing_else(home: Path) -> None:
    assert run("leave", home)[0] == 130, "nobody said yes"
    assert (home / "key.pem").exists()
    code, out, words = run("leave", home, "--yes", "--json")
    assert code == 0
    assert told(out)["destroyed"] == [str(home / "key.pem")]
    assert "cofuse coordinator revoke HUB --name participant/st-anna" in words
    kept = {"participant.toml", "policy.toml", "request.csr"}
    assert {path.name for path in home.iterdir()} == kept


def test_up_writes_a_unit_of_this_user(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    unit = Path(run("up", home, "--install")[1].strip())
    assert unit.parent == tmp_path / ".config" / "systemd" / "user"
    assert f"-m cofuse.cli up {home}\n" in unit.read_text()
    assert run("up", tmp_path)[0] == 2


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_schema_is_one(name: str) -> None:
    text = run("schema", name)[1]
    found = json.loads(text)
    assert found["properties"]
    assert found["additionalProperties"] is False
    for place in re.findall(r'"\$ref": "#/\$defs/(\w+)"', text):
        assert found["$defs"][place]


def test_config_says_where_each_value_comes_from(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run("config", home, "--origin")[1].splitlines()
    rows = {line.split(" = ")[0].strip(): line.rpartition("# ")[2] for line in shown}
    assert rows["name"] == rows["training.steps"] == str(home / "participant.toml")
    assert rows["min_free_mb"] == rows["training.lr"] == "default"
    assert rows["policy.logits.k_max"] == str(home / "policy.toml")
    monkeypatch.setenv("COFUSE_AT", "hub:7443")
    shown = run("config", "--origin")[1].splitlines()
    assert shown[0].endswith("# environment, COFUSE_AT")
    assert shown[1].endswith("# nowhere")


def test_an_option_is_stronger_than_the_environment_and_that_than_the_login(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COFUSE_PROFILE", str(tmp_path / "profile.toml"))
    for name in TlsFiles.__dataclass_fields__:
        (tmp_path / f"{name}.pem").write_text("")
    said = run("login", "login.example:1", tmp_path, "--no-check")
    assert said[0] == 0
    monkeypatch.setenv("COFUSE_IDENTITY", str(tmp_path / "none"))
    assert f"{tmp_path / 'none'}" in run("ps")[2]
    assert "elsewhere/key.pem" in run("ps", "--identity", "elsewhere")[2]
