"""What `cofuse round show` says of the sources of a finished round."""

from cofuse.commands.rounds import _judged

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
