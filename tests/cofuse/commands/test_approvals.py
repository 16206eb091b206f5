"""`cofuse approve`: what is shown is all that would leave, and a decision is what was said."""

import time
from pathlib import Path
from typing import Any

import pytest

from participant.approvals import Approvals
from participant.budget import Ledger, Question
from participant.policy import LogitLimits
from protos.public_sets import write_prompts
from tests.cofuse import command_line
from tests.cofuse.envelope import told
from tests.participant.settings import write_settings
from tests.participant.test_approvals import release


@pytest.fixture
def home(tmp_path: Path) -> Path:
    write_settings(tmp_path)
    files = tmp_path / "data" / "rounds" / "rnd-2"
    files.mkdir(parents=True)
    write_prompts(files / "prompts.jsonl", [f"public text {number}" for number in range(50)])
    ledger = Ledger(tmp_path / "data" / "budget.jsonl")
    for number, positions in ((1, 700), (2, 1_234)):
        asked = Question(
            round_id=f"rnd-{number}",
            kind="logits",
            model="m",
            prompt_set=f"p{number}",
            form="top_k 16",
            positions=positions,
        )
        ledger.reserve(asked, LogitLimits())
    return tmp_path


def desk(home: Path) -> Approvals:
    return Approvals(home / "data" / "approvals")


def waiting(home: Path, round_id: str = "rnd-2", **change: Any) -> str:
    now = time.time_ns() // 1_000_000
    gates = "what reads the release alone: auc 0.512"
    known = {"positions": 1_234, "size_bytes": 98_765, "asked_unix_ms": now, "gates": gates}
    return desk(home).ask(release(round_id, **known | change)).release_id


def run(*words: object) -> tuple[int, str, str]:
    return command_line.run("approve", *words)


def test_everything_that_an_approver_should_know_is_shown_and_nothing_decided(home: Path) -> None:
    release_id = waiting(home)
    code, shown, said = run("rnd-2", home)
    assert code == 0
    for fact in (
        release_id,
        "radiology, submitted by ada",
        "allow 1: radiology",
        "top 16 log-probabilities of the expert",
        "positions  1,234",
        "98,765",
        "canaries   what reads the release alone: auc 0.512",
        "700 positions of 30 days before, 1,934 with it",
        "10 of 50",
    ):
        assert fact in shown
    assert shown.count("'public text") == 10
    assert "nothing is decided" in said
    assert desk(home).decision(desk(home).find("rnd-2")) is None


def test_a_yes_and_a_no_are_kept_with_who_said_them(home: Path) -> None:
    for round_id, how, approved in (
        ("rnd-2", ("--yes",), True),
        ("rnd-3", ("--refuse", "too early"), False),
    ):
        waiting(home, round_id)
        asked = desk(home).find(round_id)
        code, out, _ = run(round_id, home, *how, "--by", "grace", "--json")
        assert code == 0
        found = desk(home).decision(asked)
        assert found is not None
        assert (found.approved, found.by) == (approved, "grace")
        assert told(out)["approved"] is approved
        assert found.why == ("" if approved else "too early")


def test_what_waits_is_listed_oldest_first(home: Path) -> None:
    assert "nothing waits" in run(home)[2]
    older, newer = waiting(home, "rnd-3"), waiting(home, "rnd-2", asked_unix_ms=10**13)
    code, shown, _ = run(home)
    assert code == 0
    assert [line.split()[0] for line in shown.splitlines()] == [older, newer]
    answer = told(run(home, "--json")[1])
    assert [row["release"] for row in answer["waiting"]] == [older, newer]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("rnd-9", "HOME"), 1, "found no release 'rnd-9' that waits, wanted one of: rnd-2-"),
        (("rnd-2", "HOME", "--yes", "--by", "ada"), 1, "whoever asks does not approve"),
        (("rnd-2", "HOME", "--yes", "--refuse", "x"), 2, "wanted one of them"),
        (("rnd-2", "nowhere"), 2, "participant.toml: cannot be read"),
        (("nowhere",), 2, "participant.toml: cannot be read"),
    ],
)
def test_what_cannot_be_decided_says_why(
    home: Path, arguments: tuple[str, ...], code: int, says: str
) -> None:
    waiting(home)
    found = run(*(str(home) if one == "HOME" else one for one in arguments))
    assert found[0] == code
    assert says in found[2]
    assert desk(home).waiting()
