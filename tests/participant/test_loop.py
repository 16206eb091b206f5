"""The guard's loop when another process fails it; what it believes of what it is told."""

import socket
from pathlib import Path
from typing import Any

import pytest

from participant.line import FailedThereError, PeerLostError
from participant.loop import Program
from participant.sandbox import make_folders
from participant.spool import Entry
from protos.messages import Assignment
from tests.participant.test_checkup import config_at

SPEC = {
    "name": "x",
    "pivot": "pivot-0",
    "participants": ["p"],
    "kind": "weights",
    "method": "merge",
    "training": {"steps": 1, "lr": 0.1},
}
ENTRY = Entry(
    assignment=Assignment.model_validate(
        {
            "round_id": "rnd-1",
            "attempt": 1,
            "submitted_by": "ada",
            "spec": SPEC,
            "pivot_sha256": "0" * 64,
            "deadline_unix_ms": 0,
        }
    )
)


@pytest.fixture
def program(tmp_path: Path) -> Program:
    config = config_at(tmp_path, tmp_path / "corpus.jsonl")
    make_folders(config)
    end, _ = socket.socketpair()
    return Program(config, end, lambda _kind, _body: None)


def fails(program: Program, monkeypatch: pytest.MonkeyPatch, error: Exception) -> Any:
    def hold(_should_stop: object) -> None:
        raise error

    monkeypatch.setattr(program._trainer, "hold", hold)
    return program._done(ENTRY, lambda: False)


def test_work_that_kills_the_trainer_again_and_again_is_said_to_have_failed(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the round would wait for it until its deadline, and so would every other."""
    for _ in range(9):  # it is not the courier's death that the work can be blamed for
        assert fails(program, monkeypatch, PeerLostError("courier")) is None
    assert fails(program, monkeypatch, PeerLostError("trainer")) is None
    assert fails(program, monkeypatch, PeerLostError("trainer")) is None
    report = fails(program, monkeypatch, PeerLostError("trainer"))
    assert (report.status, report.detail) == ("failed", "PeerLostError: the trainer ended")


def test_what_failed_in_the_trainer_is_reported_in_its_words(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = fails(program, monkeypatch, FailedThereError("OutOfMemoryError: 3 GB"))
    assert (report.status, report.detail) == ("failed", "OutOfMemoryError: 3 GB")


def test_a_certificate_of_somebody_else_does_not_take_the_place_of_ours(program: Program) -> None:
    place = program._config.tls.certificate
    place.write_text("ours", encoding="utf-8")
    with pytest.raises(Exception, match="certificate"):
        program._heard.says()["courier", "certificate"]({"pem": "theirs"})
    assert place.read_text(encoding="utf-8") == "ours"
