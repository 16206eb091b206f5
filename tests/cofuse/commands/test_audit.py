"""`cofuse audit verify | export` and `cofuse egress`, as a data officer calls them."""

import sqlite3
from pathlib import Path

import pytest

from coordinator.auditor import Auditor
from participant.egress import FOLDER, EgressLog, read_records
from tests.cofuse.command_line import run
from tests.cofuse.envelope import told
from tests.coordinator.archive import Archive, make_archive
from tests.participant.settings import write_settings
from trust.audit_files import segments
from trust.chain import Head


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A participant's folder with five releases and a refusal."""
    home = tmp_path / "st-mary"
    home.mkdir()
    write_settings(home)
    log = EgressLog(home / "data", "st-mary")
    for number in range(5):
        log.append(
            round_id=f"rnd-{number}",
            what="logits",
            size_bytes=1000,
            sha256=f"{number}" * 64,
            rule="allow[1]",
        )
    log.refuse(round_id="rnd-9", what="weights", why="ship_weights is false")
    log.close()
    return home


def answer(*arguments: object) -> dict[str, object]:
    found: dict[str, object] = told(run(*arguments, "--json")[1])
    return found


@pytest.mark.parametrize("command", [("egress",), ("participant", "egress")])
def test_every_byte_that_left_is_listed_with_its_rule(home: Path, command: tuple[str]) -> None:
    code, shown, said = run(*command, home)
    assert code == 0
    assert [line.split()[1] for line in shown.splitlines()] == [
        "round",
        *(f"rnd-{n}" for n in (0, 1, 2, 3, 4, 9)),
    ]
    assert shown.count("1,000") == shown.count("allow[1]") == 5
    assert "refused" in shown.splitlines()[-1]
    assert "5,000 bytes in all, 5 releases; 1 refused" in said
    found = told(run(*command, home, "--json")[1])
    assert found["total_bytes"] == 5000
    assert {one["approver"] for one in found["releases"]} == {"policy"}
    assert [one["rule"] for one in found["refusals"]] == ["ship_weights is false"]


def test_what_nobody_touched_is_said_to_be_whole(home: Path) -> None:
    for path in (home, home / "data" / FOLDER, segments(home / "data" / FOLDER)[0]):
        code, shown, _ = run("audit", "verify", path)
        assert (code, "records 1 to 6" in shown, "signed up to 6" in shown) == (0, True, True)
    assert answer("audit", "verify", home)["ok"] is True


def test_an_edited_record_is_named_and_is_exit_status_1(home: Path) -> None:
    path = segments(home / "data" / FOLDER)[0]
    path.write_bytes(path.read_bytes().replace(b"rnd-2", b"rnd-7"))
    code, _, said = run("audit", "verify", home)
    assert code == 1
    assert "BROKEN at record 3" in said
    found = answer("audit", "verify", home)
    assert (found["ok"], found["broken"]["seq"]) == (False, 3)  # type: ignore[index]
    code, _, said = run("egress", home)
    assert code == 1
    assert f"cofuse audit verify {home}" in said


def test_a_record_cut_off_is_named(home: Path) -> None:
    path = segments(home / "data" / FOLDER)[0]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert answer("audit", "verify", home)["broken"]["seq"] == 6  # type: ignore[index]


@pytest.mark.parametrize(
    ("bounds", "first", "last"),
    [
        ((), 1, 6),
        (("--from", 3), 3, 6),
        (("--to", 2), 1, 2),
        (("--from", 2, "--to", 4), 2, 4),
        (("--from", "2020-01-01", "--to", "2100"), 1, 6),
    ],
)
def test_an_excerpt_is_verified_away_from_home(
    home: Path, tmp_path: Path, bounds: tuple[object, ...], first: int, last: int
) -> None:
    out = tmp_path / "out"
    assert run("audit", "export", home, out, *bounds)[0] == 0
    assert sorted(path.name for path in out.iterdir()) == [
        f"{first:012d}.jsonl",
        "audit.pub",
        "checkpoints.jsonl",
    ]
    found = answer("audit", "verify", out, "--excerpt")
    assert (found["ok"], found["first"], found["last"], found["signed"]) == (
        True,
        first,
        last,
        last,
    )
    assert answer("audit", "verify", out)["ok"] is (first == 1)
    lines = (out / f"{first:012d}.jsonl").read_bytes().splitlines(keepends=True)
    (out / f"{first:012d}.jsonl").write_bytes(b"".join(lines[:-1]))
    assert answer("audit", "verify", out, "--excerpt")["ok"] is False


def test_an_empty_range_and_a_folder_in_the_way_are_said(home: Path, tmp_path: Path) -> None:
    code, _, said = run("audit", "export", home, tmp_path / "out", "--from", "2100-01-01")
    assert (code, "no record in that range" in said) == (2, True)
    (tmp_path / "out").mkdir()
    assert run("audit", "export", home, tmp_path / "out")[0] == 2


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A coordinator's folder with a story, signed to its end."""
    hub = tmp_path / "hub"
    assert run("coordinator", "init", hub)[0] == 0
    store = make_archive(hub / "data").store
    auditor = Auditor(store, hub / "data")
    auditor.start()
    auditor.stop()
    store.close()
    return hub


def test_a_coordinators_chain_is_verified_and_exported_likewise(hub: Path, tmp_path: Path) -> None:
    found = answer("audit", "verify", hub)
    assert (found["ok"], found["first"], found["signed"]) == (True, 1, found["last"])
    assert run("audit", "export", hub, tmp_path / "out", "--from", 5)[0] == 0
    excerpt = answer("audit", "verify", tmp_path / "out", "--excerpt")
    assert (excerpt["ok"], excerpt["first"], excerpt["head"]) == (True, 5, found["head"])
    database = sqlite3.connect(hub / "data" / "coordinator.sqlite")
    with database:
        database.execute(
            "UPDATE audit SET line = replace(line, 'st-mary', 'st-jude') WHERE seq = 6"
        )
    database.close()
    assert answer("audit", "verify", hub)["broken"]["seq"] == 6  # type: ignore[index]
    code, shown, _ = run("coordinator", "fsck", hub)
    assert (code, "I5 BROKEN" in shown) == (1, True)


def test_an_alarm_ends_when_somebody_accepts_it_and_that_is_a_record(home: Path, hub: Path) -> None:
    log = EgressLog(home / "data", "st-mary")
    for seq in (9, 4):
        log.witness(Head(seq, "a" * 64))
    store = Archive.opened(hub / "data").store
    for seq in (9, 4):
        store.take_anchor("st-mary", Head(seq, "a" * 64))
    assert log.alarm()
    assert store.anchors()["st-mary"].alarm
    for arguments in ((home,), (hub, "--name", "st-mary")):
        assert run("audit", "accept", *arguments, "--why", "restored on Monday")[0] == 0
        assert run("audit", "accept", *arguments, "--why", "again")[0] == 1
        assert answer("audit", "verify", arguments[0])["ok"] is True
    assert not log.alarm()
    assert not store.anchors()["st-mary"].alarm
    store.close()
    [record] = read_records(home / "data", "anchor.accepted")
    assert (record["why"], "went back" in record["data"]["alarm"]) == ("restored on Monday", True)


def test_what_is_no_chain_is_said(tmp_path: Path) -> None:
    code, _, said = run("audit", "verify", tmp_path)
    assert code == 2
    assert "found no audit chain" in said
    assert run("audit", "verify", tmp_path / "nowhere")[0] == 2
