"""`cofuse doctor`: what it says, and how it exits."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cofuse.cli import app
from participant import checkup
from participant.egress import CHECKED, read_records
from tests.participant.test_checkup import config_at
from trust.attempts import Attempt
from trust.walls import Held

WHOLE = Held(abi=6)
NONE = Held(namespace="found no leave", landlock="found a kernel without Landlock")


def stand_in(held: Held, through: tuple[str, ...]) -> object:
    """A probe whose kernel agreed to `held`, and which some verbs got through."""

    def probe(
        _module: str, _arguments: list[str], attempts: list[Attempt]
    ) -> tuple[Held, list[str]]:
        return held, ["" if one.verb in through else "Permission denied" for one in attempts]

    return probe


@pytest.mark.parametrize(
    ("held", "through", "walls", "status", "words"),
    [
        (WHOLE, (), "required", 0, ""),
        (WHOLE, ("read",), "offered", 1, "1 got through"),
        (NONE, ("connect", "read"), "offered", 0, "not on this machine: guard: found no leave"),
        (NONE, ("connect", "read"), "required", 1, "not on this machine: courier: found a kernel"),
    ],
)
def test_it_fails_when_a_wall_that_should_stand_does_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    held: Held,
    through: tuple[str, ...],
    walls: str,
    status: int,
    words: str,
) -> None:
    config = config_at(tmp_path, tmp_path / "corpus.jsonl")
    toml = tmp_path / "participant.toml"
    toml.write_text(f'walls = "{walls}"\n{toml.read_text()}', encoding="utf-8")
    monkeypatch.setattr(checkup, "probe", stand_in(held, through))
    done = CliRunner().invoke(app, ["doctor", str(tmp_path), "--json"])
    assert done.exit_code == status, done.output
    assert words in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["ok"] == (status == 0)
    (line,) = read_records(config.data_dir, CHECKED)
    assert line["res"] == ("deny" if words == "1 got through" else "ok")


def test_it_says_which_file_it_cannot_read(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    assert done.exit_code == 2
    assert "participant.toml: cannot be read" in done.stderr
