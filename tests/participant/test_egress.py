"""What left is written down, in order, and adds up."""

from pathlib import Path

from participant.egress import EgressLog


def test_every_release_stays_written_down(tmp_path: Path) -> None:
    path = tmp_path / "egress.jsonl"
    for number in range(3):
        EgressLog(path).append(round_id="rnd-1", what="logits", size_bytes=number, sha256="x")
    log = EgressLog(path)
    assert [line["size_bytes"] for line in log.lines()] == [0, 1, 2]
    assert log.total_bytes() == 3
