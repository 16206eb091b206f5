"""What is said of rounds by the calendar; the wire is in tests/integration/test_services.py."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cofuse.cli import app
from cofuse.commands import recurring
from cofuse.sdk_rows import Recurring
from protos.recurring import load_recurring
from tests.cofuse.envelope import told

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "recurring-weekly.yaml"
SUNDAY_MS = 1_795_485_600_000


class Coordinator:
    """Answers with two rows."""

    def __init__(self) -> None:
        spec = load_recurring(EXAMPLE)
        waits = "waits for newer experts: found 1 (north), wanted 2"
        self.rows = [
            Recurring("rec-1", "ACTIVE", SUNDAY_MS, "rnd-7", waits, spec),
            Recurring("rec-2", "STOPPED", SUNDAY_MS, "", "by cofuse://operator/op", spec),
        ]

    def recurring(self) -> list[Recurring]:
        return self.rows


@pytest.fixture(autouse=True)
def coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def connected(at: str, identity: Path) -> Iterator[Coordinator]:
        yield Coordinator()

    monkeypatch.setattr(recurring, "connected", connected)


def run(*words: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["recurring", *words, "--at", "hub:1", "--identity", "."])
    return done.exit_code, done.stdout


def test_all_are_listed_with_what_they_wait_for_and_only_active_ones_have_a_next_time() -> None:
    first, second = run("ls")[1].splitlines()
    assert ("next 2026-11-" in first, "next" in second) == (True, False)
    assert "last rnd-7  waits for newer experts: found 1 (north), wanted 2" in first
    assert "by cofuse://operator/op" in second


def test_one_is_shown_with_its_calendar_and_its_round() -> None:
    code, words = run("show", "rec-1")
    assert code == 0
    for part in ("0 2 * * sun (Europe/Paris)", "rnd-7", "st-mary, north, lakeside (quorum 2)"):
        assert part in words
    shown = told(run("show", "rec-1", "--json")[1])
    assert (shown["recurring_id"], shown["state"]) == ("rec-1", "ACTIVE")
    assert shown["spec"]["round"]["participants"] == ["st-mary", "north", "lakeside"]


def test_an_unknown_one_is_said_so_with_the_remedy() -> None:
    code, words = run("show", "rec-9", "--json")
    error = json.loads(words.splitlines()[-1])["error"]
    assert (code != 0, error["code"]) == (True, "unknown_recurring")
    assert "cofuse recurring ls" in json.dumps(error)
