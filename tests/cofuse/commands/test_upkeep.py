"""Promises of `cofuse coordinator fsck | backup | restore`: words, remedies and exit statuses."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cofuse.commands.coordinators import app
from tests.cofuse.envelope import told
from tests.coordinator.archive import Archive, make_archive


def run(*words: object) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def home(tmp_path: Path) -> Path:
    assert run("init", tmp_path / "home")[0] == 0
    make_archive(tmp_path / "home" / "data").store.close()
    return tmp_path / "home"


def damage(home: Path) -> None:
    store = Archive.opened(home / "data").store
    [part] = [c for c in store.contributions("rnd-3") if c.sha256]
    next((home / "data").rglob(part.sha256)).unlink()
    store.close()


def test_fsck_has_a_line_for_each_promise(home: Path) -> None:
    status, out, _ = run("fsck", home)
    assert status == 0
    assert "BROKEN" not in out
    assert "I1 holds" in out
    assert "I5 holds" in out
    assert "I6 not checked" in out


def test_fsck_says_what_is_broken_and_what_to_do(home: Path) -> None:
    damage(home)
    status, out, words = run("fsck", home, "--json")
    assert status == 1
    assert "I1 BROKEN" in words
    assert "contribution of st-mary to rnd-3" in words
    assert "do: copy the file" in words
    said = told(out)
    assert (said["ok"], [finding["invariant"] for finding in said["findings"]]) == (False, ["I1"])


def test_a_backup_is_restored_where_nothing_is(home: Path, tmp_path: Path) -> None:
    status, out, words = run("backup", home, tmp_path / "backup")
    assert status == 0
    assert Path(out.strip()).is_file()
    assert "ca" in words, "the operator hears that keys are not in it"
    status, _, words = run("restore", home, tmp_path / "backup")
    assert status == 2
    assert "Move it away" in words
    (home / "data").rename(tmp_path / "lost")
    status, out, words = run("restore", home, tmp_path / "backup")
    assert status == 0
    assert "BROKEN" not in out
    assert f"cofuse coordinator up {home}" in words
    assert run("fsck", home)[0] == 0


def test_no_configuration_and_no_backup_are_said(home: Path, tmp_path: Path) -> None:
    for words in (["fsck", tmp_path], ["backup", tmp_path, tmp_path / "b"]):
        status, _, told = run(*words)
        assert status == 2
        assert "coordinator.toml" in told
    status, _, told = run("restore", home, tmp_path / "nothing")
    assert status == 2
    assert "nothing" in told
