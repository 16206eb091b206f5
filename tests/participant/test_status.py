"""The status socket."""

import stat
from pathlib import Path
from typing import Any

import psutil

from participant.status import SOCKET, StatusServer, read_status


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
