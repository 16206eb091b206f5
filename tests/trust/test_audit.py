import os
import stat
import threading
from multiprocessing import get_context
from pathlib import Path

import pytest

from trust import audit
from trust.audit import REPAIRED, AuditLog
from trust.audit_files import (
    CHECKPOINTS,
    KEY,
    check,
    open_chain,
    read_checkpoints,
    read_lines,
    segments,
)
from trust.chain import AuditError, Entry, read_record
from trust.checkpoints import CHECKPOINT_EVERY, Verdict

OWNER = "cofuse://participant/st-mary"


def entry(number: int = 0) -> Entry:
    return Entry(actor=OWNER, act="release.intent", obj=f"rnd-{number}", data={"size_bytes": 5})


def fill(folder: Path, count: int, **settings: int) -> AuditLog:
    log = AuditLog(folder, OWNER, **settings)
    for number in range(count):
        log.append(entry(number))
    return log


def acts(folder: Path) -> list[str]:
    return [read_record(line)["act"] for line in read_lines(segments(folder))]


def whole(verdict: Verdict, last: int) -> bool:
    return verdict.broken is None and (verdict.first, verdict.head.seq) == (1, last)


def test_what_was_appended_is_there_for_the_next_one_who_opens_it(tmp_path: Path) -> None:
    head = fill(tmp_path, 3).head
    assert AuditLog(tmp_path, OWNER).head == head == check(tmp_path).head
    assert fill(tmp_path, 2).head.seq == 5
    assert whole(check(tmp_path), 5)


def test_the_key_is_the_owners_and_the_records_are_not_the_worlds(tmp_path: Path) -> None:
    fill(tmp_path / "audit", 1)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "audit").iterdir()}
    assert modes[KEY] == 0o600
    assert modes["000000000001.jsonl"] & 0o007 == 0


def test_several_records_go_to_disk_with_one_sync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fill(tmp_path, 2)
    log.sign()
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (synced.append(handle), fsync(handle)))
    log.append(*(entry(number) for number in range(50)))
    assert len(synced) == 1
    assert whole(check(tmp_path), 52)


def test_a_line_torn_anywhere_is_cut_off_and_that_is_recorded(tmp_path: Path) -> None:
    fill(tmp_path, 2)
    path = segments(tmp_path)[0]
    content = path.read_bytes()
    second = content.index(b"\n") + 1
    for size in (second, second + 1, *range(second + 7, len(content), 19), len(content) - 1):
        (tmp_path / CHECKPOINTS).unlink()
        path.write_bytes(content[:size])
        log = AuditLog(tmp_path, OWNER)
        torn = size - second
        assert acts(tmp_path) == ["release.intent"] + [REPAIRED] * (torn > 0)
        log.append(entry())
        assert whole(check(tmp_path), 3 if torn else 2)


def test_a_torn_checkpoint_is_cut_off(tmp_path: Path) -> None:
    log = fill(tmp_path, 1)
    log.sign()
    path = tmp_path / CHECKPOINTS
    path.write_bytes(path.read_bytes()[:-9])
    AuditLog(tmp_path, OWNER).sign()
    assert check(tmp_path).signed == 1


def test_a_write_that_failed_half_way_does_not_break_what_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fill(tmp_path, 2)

    def full(path: Path, content: bytes) -> None:
        with path.open("ab") as file:
            file.write(content[:-20])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(audit, "append", full)
        with pytest.raises(OSError, match="No space"):
            log.append(entry(), entry())
    log.append(entry())
    assert acts(tmp_path)[2:] == ["release.intent", REPAIRED, "release.intent"]
    assert whole(check(tmp_path), 5)


def test_a_full_segment_gets_a_successor_and_none_may_be_missing(tmp_path: Path) -> None:
    fill(tmp_path, 12, segment_bytes=1500).sign()
    found = segments(tmp_path)
    assert len(found) > 2
    assert all(path.stat().st_size < 2000 for path in found)
    assert whole(check(tmp_path), 12)
    assert all(check(path).broken is None for path in found)
    found[1].unlink()
    broken = check(tmp_path).broken
    assert broken is not None
    assert broken.seq == int(found[1].stem)


def test_without_its_first_segment_it_is_no_whole_chain(tmp_path: Path) -> None:
    fill(tmp_path, 12, segment_bytes=1500).sign()
    segments(tmp_path)[0].unlink()
    assert check(tmp_path, whole=False).broken is None
    broken = check(tmp_path).broken
    assert broken is not None
    assert broken.seq == 1


def test_a_crash_between_making_a_segment_and_filling_it_is_none(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    (tmp_path / "000000000004.jsonl").touch()
    fill(tmp_path, 1)
    assert whole(check(tmp_path), 4)


def test_a_checkpoint_comes_with_many_records_and_with_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = fill(tmp_path, 1)  # the first signs at once: how long a record waits, nobody knew
    assert check(tmp_path).signed == 1
    log.append(*(entry(n) for n in range(CHECKPOINT_EVERY - 1)))
    assert check(tmp_path).signed == 1
    log.append(entry())
    assert check(tmp_path).signed == CHECKPOINT_EVERY + 1
    log.append(entry())
    assert log.sign_if_due().seq == CHECKPOINT_EVERY + 2
    assert check(tmp_path).signed == CHECKPOINT_EVERY + 1
    monkeypatch.setattr(audit, "CHECKPOINT_S", 0.0)
    log.sign_if_due()
    log.sign_if_due()
    assert check(tmp_path).signed == CHECKPOINT_EVERY + 2
    assert len(read_checkpoints(tmp_path / CHECKPOINTS)) == 3


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_nobody_goes_on_below_a_checkpoint(tmp_path: Path, kept: int) -> None:
    fill(tmp_path, 3).sign()
    path = segments(tmp_path)[0]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:kept]))
    with pytest.raises(AuditError, match="record 3 as it was signed"):
        AuditLog(tmp_path, OWNER)


def test_nobody_goes_on_from_a_changed_end(tmp_path: Path) -> None:
    fill(tmp_path, 3)
    path = segments(tmp_path)[0]
    path.write_bytes(path.read_bytes().replace(b"rnd-2", b"rnd-9"))
    with pytest.raises(AuditError, match="changed"):
        AuditLog(tmp_path, OWNER)


def test_threads_take_turns(tmp_path: Path) -> None:
    log = AuditLog(tmp_path, OWNER)
    threads = [
        threading.Thread(target=lambda: [log.append(entry(n)) for n in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert whole(check(tmp_path), 80)


def test_processes_take_turns(tmp_path: Path) -> None:
    log = fill(tmp_path, 1)
    others = [get_context("fork").Process(target=fill, args=(tmp_path, 10)) for _ in range(2)]
    for other in others:
        other.start()
    for number in range(10):
        log.append(entry(number))
    for other in others:
        other.join()
    assert whole(check(tmp_path), 31)


@pytest.mark.parametrize(("first", "count"), [(1, 9), (1, 3), (4, 3), (9, 1), (5, 9)])
def test_an_export_is_verified_as_it_lies(tmp_path: Path, first: int, count: int) -> None:
    source = tmp_path / "source"
    fill(source, 9).sign()
    out = source / "out"
    wanted = range(first, first + count)
    open_chain(source).export(out, lambda record: record["seq"] in wanted)
    verdict = check(out, whole=False)
    assert verdict.broken is None
    assert (verdict.first, verdict.head.seq) == (first, min(9, first - 1 + count))
    assert verdict.signed == verdict.head.seq  # its end is signed, wherever it is
    assert not (out / KEY).exists()
