"""The status socket."""

import stat
from pathlib import Path
from typing import Any

import psutil
import pytest

from participant.status import (
    PAUSED,
    SOCKET,
    Pause,
    StatusServer,
    pause,
    paused,
    read_status,
    resume,
)


def test_a_reader_of_the_folder_is_told_and_nobody_else_could_ask(tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 60) / ("y" * 60)  # longer than a socket's name may be
    deep.mkdir(parents=True)
    assert read_status(deep) is None
    before = _listening()
    server = StatusServer(deep, lambda: {"doing": "waiting"})
    server.open()
    assert [read_status(deep) for _ in range(3)] == [{"doing": "waiting"}] * 3
    assert stat.S_IMODE((deep / SOCKET).stat().st_mode) == 0o600
    assert _listening() <= before
    server.close()
    assert read_status(deep) is None


def _listening() -> set[Any]:
    connections = psutil.Process().net_connections("inet")
    return {tuple(c.laddr) for c in connections if c.status == "LISTEN"}


def test_a_socket_that_a_killed_daemon_left_is_replaced(tmp_path: Path) -> None:
    left = StatusServer(tmp_path, dict)
    left.open()
    again = StatusServer(tmp_path, lambda: {"who": "the second"})
    again.open()
    assert read_status(tmp_path) == {"who": "the second"}
    left._listener.close()
    again.close()


@pytest.mark.parametrize(
    ("text", "now", "rests"),
    [("", 10, True), ("9", 10, False), ("10", 10, False), ("11", 10, True), ("soon", 10, True)],
)
def test_a_pause_lasts_until_its_time_and_without_one_until_resume(
    tmp_path: Path, text: str, now: int, rests: bool
) -> None:
    assert paused(tmp_path, now) is None
    (tmp_path / PAUSED).write_text(text)
    assert (paused(tmp_path, now) is not None) is rests
    resume(tmp_path)
    assert paused(tmp_path, now) is None


def test_a_pause_is_what_was_said(tmp_path: Path) -> None:
    pause(tmp_path, 2**45)
    assert paused(tmp_path) == Pause(2**45)
    pause(tmp_path)
    assert paused(tmp_path) == Pause(0)
