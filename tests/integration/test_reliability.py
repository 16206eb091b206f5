"""The reliability programs in their short form: they run, they find nothing, they would find it."""

import json
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import reliability, reliability_kills, reliability_many, reliability_uploads
from benchmarks.reliability_witness import Witness, double_fused, lost, promises
from cofuse.sdk import Pivot
from protos.chunks import sha256_of

pytestmark = pytest.mark.timeout(600)


def test_an_upload_that_is_cut_arrives_whole_and_sends_little_twice() -> None:
    found = reliability_uploads.measure(16, 3)
    assert found["upload_whole"]
    assert found["upload_cuts"] == 3
    assert 0 < found["resent_chunks_max"] <= 1


@pytest.mark.slow
def test_light_participants_attend_and_all_their_receipts_are_kept() -> None:
    found = reliability_many.measure(8, window_s=3.0)
    assert found["missed"] == found["collect_missed"] == 0
    assert found["beats"] > 8
    assert found["receipts"] == 8
    assert found["lost_receipts"] == 0


@pytest.mark.slow
def test_kills_lose_nothing_double_nothing_and_show_nothing_half() -> None:
    found = reliability_kills.measure(6, seed=1, gap_s=3.0)
    assert found["kills"] >= 6  # one turn may take a process again as it starts
    broken = ("lost_receipts", "double_fused", "half_pivots", "unended")
    assert [found[key] for key in broken] == [0, 0, 0, 0], found["words"]


# ------------------------------------------------------- the checks themselves, on broken promises


@pytest.fixture
def database() -> sqlite3.Connection:
    """A store that counts one contribution of each of two."""
    connection = sqlite3.connect(":memory:")
    connection.execute("CREATE TABLE contributions (round_id, participant, sha256, status)")
    rows = [("rnd-1", "a", "11", "committed"), ("rnd-1", "b", "22", "committed")]
    connection.executemany("INSERT INTO contributions VALUES (?, ?, ?, ?)", rows)
    return connection


def test_a_receipt_that_the_store_does_not_hold_is_lost(database: sqlite3.Connection) -> None:
    kept, other, gone = ("rnd-1", "a", "11"), ("rnd-1", "b", "33"), ("rnd-2", "a", "11")
    assert lost(database, [kept]) == []
    assert len(lost(database, [kept, other, gone])) == 2


def test_a_round_in_two_pivots_or_a_file_that_was_not_counted_is_told(
    database: sqlite3.Connection,
) -> None:
    parts = {"a": {"sha256": "11"}, "b": {"sha256": "22"}}
    once = {"round_id": "rnd-1", "contributions": parts}
    assert double_fused(database, {"pivot-1": once}) == []
    assert len(double_fused(database, {"pivot-1": once, "pivot-2": once})) == 1
    uncounted = {"round_id": "rnd-1", "contributions": {"a": {"sha256": "33"}}}
    assert len(double_fused(database, {"pivot-1": uncounted})) == 1


def test_promises_are_read_from_the_spools(tmp_path: Path) -> None:
    spool = tmp_path / "a" / "data" / "spool"
    spool.mkdir(parents=True)
    report = {"status": "committed", "round_id": "rnd-1", "sha256": "11"}
    (spool / "rnd-1.json").write_text(json.dumps({"report": report}), encoding="utf-8")
    (spool / "rnd-2.json").write_text(json.dumps({"report": None}), encoding="utf-8")
    refused = report | {"status": "refused", "round_id": "rnd-3"}
    (spool / "rnd-3.json").write_text(json.dumps({"report": refused}), encoding="utf-8")
    assert promises(tmp_path, ["a"]) == {("rnd-1", "a", "11")}


class _Shelf:
    """A coordinator of which the witness needs two calls; its pivot's files are given."""

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files

    def pivots(self) -> list[Pivot]:
        return [Pivot("pivot-1", "pivot-0", "rnd-1", (), {})]

    def download_pivot(self, _name: str, folder: Path, *, older: bool) -> Path:
        folder.mkdir(parents=True)
        for name, text in self._files.items():
            (folder / name).write_text(text, encoding="utf-8")
        return folder


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [({}, 0), ({"weights": "other"}, 1), ({"weights": None}, 1), ({"more": "text"}, 1)],
)
def test_a_pivot_whose_files_are_not_its_sums_is_half(
    tmp_path: Path, changed: dict[str, str | None], wrong: int
) -> None:
    whole = {"weights": "text", "lineage.json": '{"round_id": "rnd-1"}'}
    for name, text in whole.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    sums = "".join(f"{sha256_of(tmp_path / name)}  {name}\n" for name in whole)
    files = {n: t for n, t in (whole | {"SHA256SUMS": sums} | changed).items() if t is not None}
    witness = Witness(_Shelf(files), tmp_path / "seen")  # type: ignore[arg-type]
    witness.look_again()
    assert len(witness.halves) == wrong


@pytest.mark.parametrize(
    "part",
    # Those that train load what trains, for 9 s each.
    [
        pytest.param(part, id=name, marks=pytest.mark.slow if part.apart else ())
        for name, part in reliability.PARTS.items()
    ],
)
def test_each_part_is_a_program_that_takes_its_arguments(part: reliability.Part) -> None:
    command = [sys.executable, part.program, *part.arguments, *part.short, "--json", "--help"]
    done = subprocess.run(
        command, cwd=reliability.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_driver_says_which_part_is_left_out_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = reliability.Part(
        program="benchmarks/no_such.py", arguments=(), short=(), minutes=1, why="nothing"
    )
    program = tmp_path / "fails.py"
    program.write_text("raise SystemExit('the disk is gone')", encoding="utf-8")
    failing = reliability.Part(
        program=str(program), arguments=(), short=(), minutes=1, why="nothing"
    )
    program = tmp_path / "finds.py"
    program.write_text("print('words'); print('{\"kills\": 3, \"more\": 1}'); raise SystemExit(1)")
    finding = reliability.Part(
        program=str(program), arguments=(), short=(), minutes=1, why="something"
    )
    parts = {"missing": missing, "failing": failing, "finding": finding}
    monkeypatch.setattr(reliability, "PARTS", parts)
    out = tmp_path / "reliability.json"
    assert reliability.main(["--short", "--out", str(out)]) == 1
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["kills"] == 3
    assert found["parts"] == {"finding": {"kills": 3, "more": 1}}
    assert found["left_out"]["missing"] == "benchmarks/no_such.py is not there"
    assert "the disk is gone" in found["left_out"]["failing"]


def test_figures_are_added_only_to_those_of_the_same_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "finds.py"
    program.write_text('print(\'{"canary": {"tpr": 1}}\')', encoding="utf-8")
    usual = reliability.Part(program=str(program), arguments=(), short=(), minutes=1, why="")
    parts = {"usual": usual, "canary": replace(usual, apart=True)}
    monkeypatch.setattr(reliability, "PARTS", parts)
    monkeypatch.setattr(reliability, "commit", lambda: "one")
    out = tmp_path / "reliability.json"
    add = ["--short", "--out", str(out), "--only", "canary", "--add"]
    assert reliability.main(["--short", "--out", str(out)]) == 0
    assert set(json.loads(out.read_text(encoding="utf-8"))["parts"]) == {"usual"}
    assert reliability.main(add) == 0
    found = json.loads(out.read_text(encoding="utf-8"))
    assert set(found["parts"]) == {"usual", "canary"}
    assert (found["commit"], found["canary"]) == ("one", {"tpr": 1})
    for other in ("two", ""):
        monkeypatch.setattr(reliability, "commit", lambda other=other: other)
        with pytest.raises(SystemExit):
            reliability.main(add)
        assert "measure all of it anew" in capsys.readouterr().err
