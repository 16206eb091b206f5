"""`cofuse coordinator user`, and what `cofuse participant page` refuses."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cofuse.cli import app
from coordinator.console.users import Users
from protos.config import toml_text


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    tls = {"ca": "ca.pem", "certificate": "c.pem", "key": "k.pem"}
    settings = {"data_dir": "data", "console": {"listen": "127.0.0.1:0"}, "tls": tls}
    (tmp_path / "coordinator.toml").write_text(toml_text(settings))
    return tmp_path


def user(*words: str, typed: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(app, ["coordinator", "user", *words], input=typed)
    return done.exit_code, done.output


def test_users_come_and_go_with_a_password_from_stdin(hub: Path) -> None:
    home = str(hub)
    assert user("add", home, "grace", "--role", "operator", typed="four random words\n")[0] == 0
    assert Users(hub / "data").verify("grace", "four random words") is not None
    assert user("ls", home)[1].split() == ["grace", "operator"]
    assert user("remove", home, "grace")[0] == 0
    assert user("remove", home, "grace")[0] == 2
    assert Users(hub / "data").all() == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("Grace", "--role", "operator"), "wanted 1 to 40 of the characters"),
        (("grace", "--role", "participant"), "wanted researcher or operator"),
        (("grace", "--role", "operator"), "12 at least"),
    ],
)
def test_what_is_no_user_is_said(hub: Path, words: tuple[str, ...], says: str) -> None:
    typed = "short\n" if "12" in says else "four random words\n"
    status, said = user("add", str(hub), *words, typed=typed)
    assert status == 2
    assert says in said


def test_a_participants_page_is_for_its_own_machine(tmp_path: Path) -> None:
    words = ["participant", "page", str(tmp_path), "--listen", "0.0.0.0:8081"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert "for this machine alone" in done.output
