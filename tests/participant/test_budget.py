"""What is spent stays spent: over any sequence of questions, clocks, crashes and restarts."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from participant.budget import (
    WINDOW_DAYS,
    WINDOW_MS,
    Entry,
    Ledger,
    Question,
    Receipted,
    Reserved,
    burn_down,
    used,
)
from participant.policy import LogitLimits, PolicyRefusalError

DAY_MS = WINDOW_MS // WINDOW_DAYS
FREE = LogitLimits(positions_per_30d=None, releases_per_prompt=None)


def question(number: int = 1, **change: object) -> Question:
    values = {
        "round_id": f"rnd-{number}",
        "kind": "logits",
        "model": "m",
        "prompt_set": f"p{number}",
        "form": "top_k 16",
        "positions": 10,
        **change,
    }
    return Question.model_validate(values)


class Clock:
    def __init__(self, now: int = 10 * WINDOW_MS) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def ledger(tmp_path: Path, clock: Clock | None = None) -> Ledger:
    return Ledger(tmp_path / "budget.jsonl", clock or Clock())


def test_a_reservation_outlives_the_process_and_asked_again_costs_no_more(tmp_path: Path) -> None:
    for _ in range(3):
        ledger(tmp_path).reserve(question(), FREE)
    assert ledger(tmp_path).used() == 10


def test_a_receipt_is_written_down_once_and_gives_nothing_back(tmp_path: Path) -> None:
    ledger(tmp_path).reserve(question(), FREE)
    for _ in range(2):
        ledger(tmp_path).receipt("rnd-1", "ab")
    kinds = [type(entry) for entry in ledger(tmp_path).entries()]
    assert kinds == [Reserved, Receipted]
    assert ledger(tmp_path).used() == 10


def test_no_round_and_no_thirty_days_hold_more_than_they_may(tmp_path: Path) -> None:
    clock = Clock()
    limits = LogitLimits(positions_per_round=10, positions_per_30d=25)
    book = ledger(tmp_path, clock)
    with pytest.raises(PolicyRefusalError, match="11 positions, positions_per_round allows 10"):
        book.reserve(question(positions=11), limits)
    book.reserve(question(1), limits)
    book.reserve(question(2), limits)
    with pytest.raises(PolicyRefusalError, match="positions_per_30d") as caught:
        book.reserve(question(3), limits)
    assert "25" not in str(caught.value)  # how much is left is nobody's business
    assert "20 positions are used" in caught.value.here
    clock.now += WINDOW_MS - 1
    with pytest.raises(PolicyRefusalError):
        book.reserve(question(3), limits)
    clock.now += 1
    book.reserve(question(3), limits)


def test_a_clock_that_is_set_back_frees_nothing(tmp_path: Path) -> None:
    clock = Clock()
    book = ledger(tmp_path, clock)
    book.reserve(question(), FREE)
    clock.now = 0
    assert book.used() == 10


def test_a_prompt_set_is_asked_about_so_often_and_no_more(tmp_path: Path) -> None:
    limits = LogitLimits(releases_per_prompt=2)
    book = ledger(tmp_path)
    for number in (1, 2):  # each of another version of the model
        book.reserve(question(number, prompt_set="p", model=f"m{number}"), limits)
    with pytest.raises(PolicyRefusalError, match="releases_per_prompt allows 2"):
        book.reserve(question(3, prompt_set="p", model="m3"), limits)
    book.reserve(question(3, prompt_set="q", model="m3"), limits)


def test_one_model_answers_on_one_prompt_set_in_one_form_for_ever(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    book.reserve(question(1, prompt_set="p"), FREE)
    with pytest.raises(PolicyRefusalError, match="another form"):
        book.reserve(question(2, prompt_set="p", form="top_k 8"), FREE)
    book.reserve(question(2, prompt_set="p"), FREE)
    book.reserve(question(3, prompt_set="q", form="top_k 8"), FREE)
    book.reserve(question(4, prompt_set="p", form="top_k 8", model="newer"), FREE)


def test_weights_are_written_down_and_cost_no_positions(tmp_path: Path) -> None:
    book = ledger(tmp_path)
    weights = question(kind="weights", prompt_set="", form="", positions=0)
    for number in range(6):
        book.reserve(weights.model_copy(update={"round_id": f"rnd-{number}"}), LogitLimits())
    assert len(book.entries()) == 6
    assert book.used() == 0


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(1, 9), st.integers(1, 15), st.integers(-5, 5)), max_size=12
    ),
    tear=st.integers(1, 40),
)
def test_what_was_reserved_is_counted_whatever_happens_after(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, int, int]], tear: int
) -> None:
    """Against a model of two lines; after each step half a line is left by a crash."""
    folder = tmp_path_factory.mktemp("ledger")
    clock, limits = Clock(), LogitLimits(positions_per_30d=40, releases_per_prompt=None)
    wanted: list[Entry] = []
    for number, positions, days in steps:
        clock.now += days * WINDOW_MS // 10
        asked = question(number, positions=positions)
        try:
            ledger(folder, clock).reserve(asked, limits)
            if asked not in [one.question for one in wanted if isinstance(one, Reserved)]:
                wanted.append(Reserved(unix_ms=clock.now, question=asked))
        except PolicyRefusalError:
            assert used(wanted, clock.now) + positions > 40
        assert ledger(folder, clock).entries() == wanted
        whole = Reserved(unix_ms=clock.now, question=asked).model_dump_json().encode()
        with (folder / "budget.jsonl").open("ab") as file:
            file.write(whole[:tear])
        assert ledger(folder, clock).entries() == wanted


def test_a_crash_at_any_write_leaves_a_whole_entry_or_none_and_no_work_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PowerCutError(Exception):
        pass

    def cut(_: int) -> None:
        raise PowerCutError

    book = ledger(tmp_path)
    book.reserve(question(1), FREE)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", cut)
        with pytest.raises(PowerCutError):
            book.reserve(question(2), FREE)
    # It was not promised, so it may be there or not; what was promised is.
    assert ledger(tmp_path).used() in (10, 20)
    # What is found there is believed only once it is on the disk itself.
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", cut)
        with pytest.raises(PowerCutError):
            book.reserve(question(2), FREE)
    book.reserve(question(2), FREE)
    assert ledger(tmp_path).used() == 20


def test_the_entry_and_the_files_name_are_on_disk_before_reserve_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    ledger(tmp_path).reserve(question(), FREE)
    assert synced == [str(tmp_path / "budget.jsonl"), str(tmp_path)]


@pytest.mark.parametrize("change", [(b"reserve", b"return"), (b":10", b":-9"), (b"{", b"", 1)])
def test_a_ledger_that_somebody_changed_allows_nothing(
    tmp_path: Path, change: tuple[bytes, bytes]
) -> None:
    book = ledger(tmp_path)
    book.reserve(question(), FREE)
    path = tmp_path / "budget.jsonl"
    path.write_bytes(path.read_bytes().replace(*change))
    with pytest.raises(PolicyRefusalError, match="the budget cannot be read") as caught:
        book.reserve(question(2), FREE)
    assert "restore the file" in caught.value.here
    assert str(tmp_path) not in str(caught.value)


def test_the_story_of_the_budget_is_its_count_at_every_day(tmp_path: Path) -> None:
    now = 100 * DAY_MS
    for day, number in ((45, 1), (75, 2), (75, 3), (99, 4)):
        Ledger(tmp_path / "budget.jsonl", lambda at=day: at * DAY_MS + 5).reserve(  # type: ignore[misc]
            question(number), FREE
        )
    book = Ledger(tmp_path / "budget.jsonl", lambda: now)
    rows = {row.at_unix_ms // DAY_MS: row for row in book.burn_down()}
    assert {day: row.used for day, row in rows.items()} == {
        70: 10,  # of day 45
        76: 20,  # it has come back, and two more were asked
        100: 30,
        106: 10,
        130: 0,
    }
    assert rows[100].used == book.used()
    assert (rows[76].asked, rows[100].asked, rows[106].asked) == (20, 10, 0)


def test_a_budget_that_nobody_asked_of_is_three_zeros() -> None:
    assert [row.used for row in burn_down([], 10**12)] == [0, 0, 0]
