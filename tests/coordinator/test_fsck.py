"""Promises of fsck: silent about a healthy coordinator, and each damage has its name and remedy."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text

from coordinator.audit import STATE, lines
from coordinator.audit import record as append
from coordinator.clock import now_unix_ms
from coordinator.fsck import CHECKED, GRACE_MS, UNCHECKED, Finding, fsck
from coordinator.rounds import Event
from coordinator.store_errors import StoreError
from tests.coordinator.archive import HOUR_MS, Archive, make_archive
from trust.chain import Entry, read_record
from trust.checkpoints import make_checkpoint

KEY = Ed25519PrivateKey.generate()


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    archive = make_archive(tmp_path / "data", "sqlite://")
    head = archive.store.audit_head()
    archive.store.sign_audit(make_checkpoint(KEY, head, now_unix_ms()))
    yield archive
    archive.store.close()


def findings(archive: Archive, *, at_ms: int = 0, hashes: bool = True) -> tuple[Finding, ...]:
    now = at_ms or now_unix_ms()
    return fsck(
        archive.store.database, archive.artifacts, now, hashes=hashes, audit_key=KEY.public_key()
    ).findings


def sql(*statements: str) -> Callable[[Archive], None]:
    def damage(archive: Archive) -> None:
        with archive.store.database.write() as db:
            for statement in statements:
                db.execute(text(statement))

    return damage


def contribution(archive: Archive) -> Path:
    [part] = [c for c in archive.store.contributions("rnd-3") if c.sha256]
    return archive.artifacts.path(part.sha256)


def lose_a_file(archive: Archive) -> None:
    contribution(archive).unlink()


def shorten_a_file(archive: Archive) -> None:
    contribution(archive).write_bytes(b"log")


def flip_a_bit(archive: Archive) -> None:
    path = contribution(archive)
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)


def cancel_after_the_pivot(archive: Archive) -> None:
    """A pivot that came out of a round which then ended otherwise."""
    store = archive.store
    archive.contribute("rnd-3", "st-luke")
    row = store.advance("rnd-3", Event.COLLECTED)
    store.advance("rnd-3", Event.FUSED)
    archive.pivot(row.pivot_name, "pivot-2", "rnd-3")
    store.advance("rnd-3", Event.CANCEL)


def cancel_as_a_participant(archive: Archive) -> None:
    archive.store.advance("rnd-3", Event.CANCEL, by="cofuse://participant/st-mary")


def write_the_chain_anew(archive: Archive) -> None:
    """What who holds the database can do, and who holds the key alone could sign."""
    with archive.store.database.write() as db:
        old = [read_record(line) for line in lines(db)]
        db.execute(text("DELETE FROM audit"))
        names = ("actor", "act", "obj", "res", "why", "data")
        for record in old:
            if record["act"] == STATE and record["data"]["state"] == "APPROVED":
                record["actor"] = "cofuse://operator/mallory"
            append(db, Entry(**{name: record[name] for name in names}))


DAMAGES = [
    (
        "I5",
        sql("UPDATE audit SET line = replace(line, 'ada', 'eve')"),
        "breaks at record 3: .*chang",
    ),
    ("I5", sql("DELETE FROM audit WHERE seq = 4"), "breaks at record 4: found record 5"),
    ("I5", sql("DELETE FROM audit WHERE seq >= 9"), "breaks at record 9: .*the end is cut off"),
    ("I5", sql("DELETE FROM audit", "DELETE FROM audit_checkpoints"), "begins with one"),
    ("I5", write_the_chain_anew, "breaks at record 1: .*written anew"),
    (
        "I5",
        sql(
            "UPDATE contributions SET sha256 = '"
            + "f" * 64
            + "' WHERE round_id = 'rnd-3' AND sha256 <> ''"
        ),
        "st-mary has a receipt in rnd-3 that the audit chain does not know",
    ),
    (
        "I7",
        sql("UPDATE events SET body_json = replace(body_json, 'APPROVED', 'REJECTED')"),
        "the audit chain says rnd-1 APPROVED where the story says rnd-1 REJECTED",
    ),
    ("I7", sql("DELETE FROM events WHERE seq > 9"), "where the story says nothing"),
    ("I7", cancel_as_a_participant, "participant/st-mary brought rnd-3 into CANCELLED"),
    ("I1", lose_a_file, "missing: .*contribution of st-mary to rnd-3"),
    ("I1", shorten_a_file, "has 3 bytes, wanted"),
    ("I1", flip_a_bit, "has sha256"),
    (
        "I2",
        sql(
            "UPDATE contributions SET sha256 = (SELECT c.sha256 FROM contributions c WHERE "
            "c.round_id = 'rnd-1' AND c.participant = 'st-mary') WHERE round_id = 'rnd-1'",
            "UPDATE contributions SET size_bytes = (SELECT c.size_bytes FROM contributions c "
            "WHERE c.round_id = 'rnd-1' AND c.participant = 'st-mary') WHERE round_id = 'rnd-1'",
        ),
        "rnd-1 holds .* 2 times",
    ),
    (
        "I2",
        sql(
            "INSERT INTO pivots SELECT 'pivot-9', parent, round_id, files_json, evals_json, "
            "created_unix_ms, promotions_needed, promotions_json FROM pivots "
            "WHERE name = 'pivot-1'"
        ),
        "rnd-1 made 2 pivots",
    ),
    ("I2", sql("UPDATE rounds SET pivot_name = 'pivot-1' WHERE number = 3"), "2 rounds"),
    ("I3", sql("DELETE FROM pivots WHERE name = 'pivot-0'"), "pivot-0, which is not there"),
    ("I3", sql("UPDATE pivots SET parent = 'pivot-2' WHERE name = 'pivot-1'"), "not older"),
    ("I3", sql("UPDATE rounds SET pivot_name = '' WHERE number = 2"), "does not name it"),
    ("I3", sql("DELETE FROM pivots WHERE name = 'pivot-2'"), "PUBLISHED, but pivot-2"),
    ("I3", cancel_after_the_pivot, "visible, but its round rnd-3 is CANCELLED"),
    ("I7", sql("UPDATE rounds SET state = 'FUSING' WHERE number = 3"), "ends with COLLECTING"),
    ("I7", sql("DELETE FROM events WHERE round_id = 'rnd-3'"), "does not begin"),
    (
        "I7",
        sql("DELETE FROM events WHERE round_id = 'rnd-1' AND body_json LIKE '%FUSING%'"),
        "COLLECTING to EVALUATING, which the table forbids",
    ),
]


def test_a_healthy_coordinator_has_no_findings(archive: Archive) -> None:
    verdict = fsck(archive.store.database, archive.artifacts, now_unix_ms())
    assert verdict.findings == ()
    # Three pivots, the prompts, and five contributions.
    assert (verdict.rounds, verdict.pivots, verdict.files) == (3, 3, 9)
    files = (archive.folder / "artifacts" / "objects").rglob("*")
    assert verdict.size_bytes == sum(path.stat().st_size for path in files if path.is_file())


@pytest.mark.parametrize(("invariant", "damage", "says"), DAMAGES)
def test_each_damage_is_named_and_has_a_remedy(
    archive: Archive, invariant: str, damage: Callable[[Archive], None], says: str
) -> None:
    damage(archive)
    found = [finding for finding in findings(archive) if finding.invariant == invariant]
    assert found

    assert any(re.search(says, finding.says) for finding in found)
    assert all(finding.do for finding in found)


def test_a_story_that_is_older_than_the_chain_is_taken_as_it_is(tmp_path: Path) -> None:
    old = make_archive(tmp_path / "data")
    sql("DELETE FROM audit")(old)  # a database of a release that kept no chain
    old.store.close()
    archive = Archive.opened(tmp_path / "data")
    archive.contribute("rnd-3", "st-luke")
    assert findings(archive) == ()
    sql("DELETE FROM events WHERE body_json LIKE '%st-luke%' AND round_id = 'rnd-3'")(archive)
    assert {finding.invariant for finding in findings(archive)} == {"I7"}
    archive.store.close()


def test_sizes_alone_do_not_show_a_flipped_bit(archive: Archive) -> None:
    flip_a_bit(archive)
    assert findings(archive, hashes=False) == ()
    shorten_a_file(archive)
    assert len(findings(archive, hashes=False)) == 1


def test_a_round_has_its_deadline_and_some_seconds(archive: Archive) -> None:
    deadline = archive.store.round("rnd-3").deadline_unix_ms
    assert findings(archive, at_ms=deadline + GRACE_MS) == ()
    [late] = findings(archive, at_ms=deadline + HOUR_MS)
    assert (late.invariant, late.says) == (
        "I4",
        "rnd-3 is COLLECTING, 3600 s after its deadline",
    )
    archive.store.advance("rnd-3", Event.CANCEL, by="cofuse://operator/grace")
    assert findings(archive, at_ms=deadline + HOUR_MS) == ()


def test_what_time_mends_is_told_apart(archive: Archive) -> None:
    deadline = archive.store.round("rnd-3").deadline_unix_ms
    lose_a_file(archive)
    verdict = fsck(archive.store.database, archive.artifacts, deadline + HOUR_MS)
    assert {finding.invariant for finding in verdict.findings} == {"I1", "I4"}
    assert {finding.invariant for finding in verdict.lasting} == {"I1"}


def test_a_database_of_another_schema_is_not_judged(archive: Archive) -> None:
    sql("UPDATE alembic_version SET version_num = '9999'")(archive)
    with pytest.raises(StoreError, match="found schema 9999"):
        findings(archive)


def test_every_invariant_is_checked_or_said_not_to_be() -> None:
    assert {*CHECKED, *UNCHECKED} == {f"I{number}" for number in range(9)}
    assert {invariant for invariant, _, _ in DAMAGES} == set(CHECKED) - {"I0", "I4"}
