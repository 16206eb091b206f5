"""`cofuse participant pause | resume | status`: with and without a daemon."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cofuse.cli import app
from participant.status import PAUSED, StatusServer
from protos.config import toml_text
from tests.cofuse.envelope import told


@pytest.fixture
def home(tmp_path: Path) -> Path:
    settings = {
        "name": "st-mary",
        "coordinator": "localhost:1",
        "corpus": "c.jsonl",
        "data_dir": "data",
        "policy": "policy.toml",
        "model": {
            "architecture": "llama",
            "hidden_size": 32,
            "layers": 1,
            "heads": 1,
            "vocab_size": 300,
        },
        "training": {"steps": 1},
        "schedule": {"start": "20:00", "end": "06:00", "days": ["fri"]},
        "tls": {"ca": "ca.pem", "certificate": "certificate.pem", "key": "key.pem"},
    }
    (tmp_path / "participant.toml").write_text(toml_text(settings), encoding="utf-8")
    return tmp_path


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["participant", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_pause_and_resume_need_no_daemon_and_outlive_one(home: Path) -> None:
    for _ in range(2):  # repeating changes nothing
        assert run("pause", home)[0] == 0
        assert (home / "data" / PAUSED).exists()
    code, _, said = run("status", home)
    assert code == 1
    assert "no daemon runs" in said
    assert "it is paused" in said
    for _ in range(2):
        assert run("resume", home)[0] == 0
        assert not (home / "data" / PAUSED).exists()


def test_status_tells_what_the_daemon_says(home: Path) -> None:
    (home / "data").mkdir()
    server = StatusServer(home / "data", lambda: {"doing": "train", "step": 3, "problem": ""})
    server.open()
    code, shown, _ = run("status", home)
    assert code == 0
    assert shown.split() == ["doing", "train", "step", "3"]
    code, shown, _ = run("status", home, "--json")
    assert told(shown) == {"ok": True, "doing": "train", "step": 3, "problem": ""}
    server.close()


def test_a_folder_that_is_none_is_said_so(tmp_path: Path) -> None:
    for command in ("pause", "resume", "status", "egress"):
        code, _, said = run(command, tmp_path)
        assert code == 2
        assert "participant.toml: cannot be read" in said


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--coordinator", "fuse.example.org:70000", "wanted host:port"),
        ("--name", "St Märy", "choose another name"),
        ("--corpus", "none.jsonl", "found no such file"),
    ],
)
def test_init_makes_nothing_before_all_is_right(
    tmp_path: Path, option: str, value: str, says: str
) -> None:
    corpus = tmp_path / "notes.jsonl"
    corpus.write_text('{"text": "one"}\n', encoding="utf-8")
    right = {"--name": "st-mary", "--coordinator": "hub:7443", "--corpus": str(corpus)}
    given = [word for pair in {**right, option: value}.items() for word in pair]
    code, _, said = run("init", tmp_path / "home", *given)
    assert code == 2
    assert says in said
    assert not (tmp_path / "home").exists()
