"""`cofuse participant pause | resume | status`: with and without a daemon."""

from pathlib import Path

import pytest

from participant.status import PAUSED, StatusServer
from tests.cofuse import command_line
from tests.cofuse.envelope import told
from tests.participant.settings import write_settings


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_settings(tmp_path, schedule={"start": "20:00", "end": "06:00", "days": ["fri"]})
    return tmp_path


def run(*words: object) -> tuple[int, str, str]:
    return command_line.run("participant", *words)


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
