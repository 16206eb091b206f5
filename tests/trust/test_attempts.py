"""What an outcome says of a wall."""

import pytest

from trust.attempts import Attempt, Verdict, judge
from trust.landlock import SCOPE_ABI
from trust.walls import Held

NOWHERE = Held(namespace="refused", landlock="refused")
WHOLE = Held(abi=SCOPE_ABI)


@pytest.mark.parametrize(
    ("verb", "held", "says"),
    [
        ("connect", WHOLE, "broken"),
        ("connect", Held(namespace="refused", abi=4), "broken"),  # Landlock closes TCP by itself
        ("connect", Held(namespace="refused", abi=3), "not enforceable here"),
        ("connect", Held(landlock="refused"), "broken"),
        ("send", Held(namespace="refused", abi=6), "not enforceable here"),
        ("send", WHOLE, "broken"),
        ("abstract", Held(abi=5), "not enforceable here"),
        ("listen", Held(abi=3), "not enforceable here"),
        ("read", Held(abi=1), "broken"),
        ("make", NOWHERE, "not enforceable here"),
    ],
)
def test_what_got_through_is_broken_only_where_the_kernel_had_agreed_to_stop_it(
    verb: str, held: Held, says: Verdict
) -> None:
    one = Attempt(verb=verb, target="", says="")
    assert judge(one, held, stopped_by="") == says
    assert judge(one, held, stopped_by="Permission denied") == "held"
