"""What `cofuse round show` says of the sources of a finished round."""

from cofuse.commands.pivots import origin
from cofuse.commands.rounds import _judged, _words
from cofuse.sdk_rows import Event, Pivot

SIGNS = {"false_nats": 3.5, "lies": 0.001, "worst_lie": 2.0}


def test_who_was_left_out_now_or_before_is_named_with_what_follows() -> None:
    credit = {
        "suspicion": {"ada": {**SIGNS, "excluded": 0.0}, "bob": {**SIGNS, "excluded": 1.0}},
        "standing": {
            "ada": {"judged": 3, "left_out": 0, "weight": 1.0},
            "bob": {"judged": 3, "left_out": 2, "weight": 0.25},
        },
    }
    ada, bob = _judged(credit)
    assert ada.split()[:3] == ["ada", "listened", "to"]
    assert "before" not in ada
    assert bob.split()[:3] == ["bob", "left", "out:"]
    assert "false_nats 3.5" in bob
    assert bob.endswith("left out of 2 of its 3 rounds before, so with weight 0.25")


def test_a_round_that_judged_nobody_says_nothing() -> None:
    assert not list(_judged({}))


def test_an_event_is_told_without_what_it_leaves_empty() -> None:
    body = {"phase": "train", "step": 2, "loss": 1.8281793594360352, "detail": ""}
    assert _words(Event(3, 0, "progress", body)) == "progress phase=train step=2 loss=1.828"


def test_a_pivot_is_told_with_where_it_is_from() -> None:
    made = [("", ""), ("pivot-0", "rnd-1"), ("pivot-1", "")]
    assert [origin(Pivot("p", parent, by, (), {})) for parent, by in made] == [
        "imported",
        "from pivot-0 in rnd-1",
        "rolled back to, instead of pivot-1",
    ]
