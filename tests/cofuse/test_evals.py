"""A pivot's evaluations as a table: every number once, shares with their intervals."""

from cofuse.evals import Evals

SAID = {
    "pivot": "unified",
    "bpb": {"base": {"heart": 2.0}, "unified": {"heart": 1.5}},
    "letter": {"base": {"exam": 0.2}, "unified": {"exam": 0.3}},
    "questions": {"exam": 40},
}


def test_shares_are_told_with_their_intervals_and_bits_without() -> None:
    found = Evals.of(SAID)
    cells = {(cell.measure, cell.model): cell for cell in found.cells()}
    share = cells["letter", "unified"]
    assert share.is_pivot
    assert share.low is not None
    assert share.high is not None
    assert share.low < 0.3 < share.high
    assert (cells["bpb", "base"].low, cells["bpb", "base"].high) == (None, None)
    text = found.table()
    assert f"0.300 ({share.low:.2f}-{share.high:.2f})" in text
    assert "2.000  2.000" in text
    assert len({len(line) for line in text.split("\n\n")[0].splitlines()[1:]}) == 1


def test_a_pivot_of_an_older_release_has_no_intervals() -> None:
    old = {key: value for key, value in SAID.items() if key != "questions"}
    assert all(cell.low is None for cell in Evals.of(old).cells())
    assert "0.300" in Evals.of(old).table()
