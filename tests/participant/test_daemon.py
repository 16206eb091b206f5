"""The supervisor: what ends it, and with which words."""

import subprocess
import sys
from pathlib import Path

from tests.participant.test_checkup import config_at


def run(folder: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "participant.daemon", str(folder / "participant.toml")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_policy_that_cannot_be_read_ends_all_with_its_words_said_once(tmp_path: Path) -> None:
    """A new start would not help; the guard says why, and no process is left."""
    config = config_at(tmp_path, tmp_path / "corpus.jsonl")
    config.policy.write_text("version = 2\nallow = 7\n", encoding="utf-8")
    done = run(tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("policy.toml:2: allow") == 1
    assert done.stdout == ""


def test_a_configuration_without_a_data_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "participant.toml").write_text('name = "x"', encoding="utf-8")
    done = run(tmp_path)
    assert done.returncode == 2
    assert "participant.toml" in done.stderr
    assert "Traceback" not in done.stderr
