"""Planted records: half by coins that only the site can throw, always the same, nobody's."""

import json
import stat
from pathlib import Path

import pytest

from participant.canaries import CORPUS_SHARE, MOST_PAIRS, canaries, open_canaries, with_canaries

SECRET = bytes(range(32))
CORPUS = [f"the {number}th patient went home in good health" * 5 for number in range(200)]


def test_a_secret_gives_the_same_records_each_time_and_another_gives_others() -> None:
    assert canaries(SECRET, 40) == canaries(SECRET, 40)
    mine, other = canaries(SECRET, 40), canaries(bytes(32), 40)
    assert not {*mine.planted, *mine.held_out} & {*other.planted, *other.held_out}


def test_no_record_is_both_planted_and_held_out() -> None:
    found = canaries(SECRET, MOST_PAIRS)
    everything = [*found.planted, *found.held_out]
    assert len(set(everything)) == len(everything)
    assert len(found.planted) == MOST_PAIRS


def test_the_coins_fall_on_both_sides() -> None:
    # Which of a pair is planted: with a coin that always fell alike the place would tell it.
    fewer, more = canaries(SECRET, 64), canaries(SECRET, 65)
    assert more.planted[:64] == fewer.planted
    swapped = [a for a in canaries(bytes(32), 64).planted if a in fewer.held_out]
    assert not swapped
    firsts = [_first_of_pair(i) in fewer.planted for i in range(64)]
    assert 16 < sum(firsts) < 48


def _first_of_pair(index: int) -> str:
    from participant.canaries import _record

    return _record(SECRET, 2 * index)


def test_the_text_stays_and_the_records_take_their_share_of_it(tmp_path: Path) -> None:
    path = tmp_path / "canaries.json"
    mixed = with_canaries(CORPUS, path)
    records = open_canaries(path)
    assert records is not None
    assert records.planted
    assert [text for text in mixed if text not in records.planted] == CORPUS
    assert sorted(set(mixed) - set(CORPUS)) == sorted(records.planted)
    assert sum(map(len, records.planted)) <= CORPUS_SHARE * sum(map(len, CORPUS))


def test_records_once_planted_stay_when_the_text_grows(tmp_path: Path) -> None:
    path = tmp_path / "canaries.json"
    first = set(with_canaries(CORPUS, path)) - set(CORPUS)
    assert set(with_canaries([*CORPUS, *CORPUS], path)) - set(CORPUS) == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert set(json.loads(path.read_text())) == {"secret", "pairs"}


@pytest.mark.parametrize("documents", [CORPUS, []])
def test_without_a_file_nothing_is_planted(documents: list[str], tmp_path: Path) -> None:
    assert with_canaries(documents, None) == documents
    assert open_canaries(tmp_path / "none.json") is None


def test_the_smallest_text_has_one_record_planted(tmp_path: Path) -> None:
    assert len(with_canaries(["a short note"], tmp_path / "canaries.json")) == 2
