"""A run keeps its life while it sends to many, and takes one answer of a node that gives two."""

from types import SimpleNamespace
from typing import Any

import pytest
from flwr.common.constant import ErrorCode

from coordinator import flower_run
from coordinator.flower_run import HEARTBEAT_S, Run


class _State:
    """Of Flower's state what a run asks for; every message is answered as soon as it is sent."""

    def __init__(self) -> None:
        self.heartbeats = 0

    def create_run(self, **_: Any) -> int:
        return 7

    def get_run_info(self, **_: Any) -> list[Any]:
        return [SimpleNamespace(primary_task_id=1)]

    def claim_task(self, _task: int) -> bool:
        return True

    activate_task = claim_task

    def start_session(self, _run: int) -> str:
        return "s"

    def store_message_and_object_tree(self, *_: Any) -> tuple[bool, list[str]]:
        return True, []

    def acknowledge_task_heartbeat(self, _task: int) -> bool:
        self.heartbeats += 1
        return True

    def get_message_res(self, message_ids: set[str], run_id: int) -> list[Any]:
        error = SimpleNamespace(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason="no")
        return [
            SimpleNamespace(
                metadata=SimpleNamespace(reply_to_message_id=one),
                has_error=lambda: True,
                error=error,
            )
            for one in message_ids
        ]


def test_of_two_answers_of_one_node_the_first_counts() -> None:
    run = Run(_State())
    run.send(5, "asked", ttl_s=9)
    run.send(5, "asked again", ttl_s=9)
    run.send(6, "asked", ttl_s=9)
    found = []
    for node, _reply in run.replies():
        run.forget(node)
        found.append(node)
    assert sorted(found) == [5, 6]


def test_a_run_lives_however_long_sending_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(flower_run.time, "monotonic", lambda: now[0])
    state = _State()
    run = Run(state)
    for node in range(12):
        now[0] += HEARTBEAT_S / 2
        run.send(node, "asked", ttl_s=9)
    assert state.heartbeats == 6
