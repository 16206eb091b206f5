"""The status socket, and the record of what left."""

import stat
from pathlib import Path
from typing import Any

import psutil

from participant.egress import EgressLog
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


def test_a_line_that_a_power_cut_tore_does_not_count_and_spoils_no_other(tmp_path: Path) -> None:
    log = EgressLog(tmp_path / "egress.jsonl")
    log.append(round_id="rnd-1", what="logits", size_bytes=10, sha256="a")
    with (tmp_path / "egress.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"round": "rnd-2", "size_by')
    assert log.total_bytes() == 10
    log.append(round_id="rnd-3", what="logits", size_bytes=5, sha256="b")
    assert [line["round"] for line in log.lines()] == ["rnd-1", "rnd-3"]
    assert log.total_bytes() == 15
