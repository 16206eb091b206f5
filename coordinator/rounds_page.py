"""docs/rounds.md, drawn from the table: `python -m coordinator.rounds_page`."""

from collections.abc import Mapping
from typing import Final

from coordinator.rounds import (
    ASSIGNMENT_LEASE_MS,
    FINAL,
    FUSION_LEASE_MS,
    MAX_LOSSES,
    REPORT_GRACE_MS,
    TRANSITIONS,
    State,
)

OWNERS: Final[Mapping[State, tuple[str, str]]] = {
    State.SUBMITTED: ("an operator", "the deadline"),
    State.APPROVED: ("the scheduler", "its next pass"),
    State.COLLECTING: ("each named participant", "its lease, then it is asked again; the deadline"),
    State.FUSING: ("the fusion worker", "its lease, then another starts; the deadline"),
    State.EVALUATING: ("the fusion worker", "its lease, then another starts; the deadline"),
}
"""Who must act in each open state, and what ends the waiting."""


def as_markdown() -> str:
    """The table, its diagram, and who owns each state, as docs/rounds.md shows them."""
    arrows = "\n".join(f"    {s} --> {t}: {e}" for (s, e), t in TRANSITIONS.items())
    rows = "\n".join(f"| {s} | {e} | {t} |" for (s, e), t in TRANSITIONS.items())
    owners = "\n".join(f"| {state} | {who} | {end} |" for state, (who, end) in OWNERS.items())
    return (
        "# Rounds\n\nDrawn from `coordinator/rounds.py` by `make docs`; "
        "a test fails when this page differs.\n\n"
        f"```mermaid\nstateDiagram-v2\n    [*] --> SUBMITTED\n{arrows}\n```\n\n"
        f"| state | event | next state |\n|---|---|---|\n{rows}\n\n"
        f"Final: {', '.join(sorted(FINAL))}.\n\n"
        "Every other state has an owner, and an end to waiting for it:\n\n"
        f"| state | who acts | until |\n|---|---|---|\n{owners}\n\n" + _TIMES + _CALENDAR
    )


_TIMES: Final = f"""## One deadline

`deadline_minutes` is the whole round's, from submission on: it is final by then, fusing included.
`fusion_minutes` is the last part of it (a third, when the spec is silent): from its beginning on
nobody is waited for once there is a quorum. All else is progress, not time:

- An assignment of which nothing is heard for {ASSIGNMENT_LEASE_MS // 60_000} minutes goes out
  again as a new attempt; one that was lost goes out at once. What an older attempt says of its
  failure no longer counts; what it contributes does.
- A fusion worker that neither computes nor speaks for {FUSION_LEASE_MS // 60_000} minutes is
  ended and followed by another, which goes on where it was. A killed one is followed at once;
  {MAX_LOSSES} lost ones end the round.
- A report may trail {REPORT_GRACE_MS // 60_000} minutes behind its contribution.
- A round fails as soon as so many have refused or failed that no quorum can come.

The clock is the wall's when the coordinator starts and steady from then on: a clock that is set
forward or back ends no round before its time. `cofuse why NAME` says what anything waits for.

"""
_CALENDAR: Final = """## Rounds by the calendar

A recurring spec (`examples/recurring-weekly.yaml`) makes a round when its time has come, so many of
its participants' experts are newer than what a pivot has learned from them (`newer_experts`), and
its last round has ended. Of times that passed meanwhile it makes up for one. Each round starts from
the newest pivot of its line, and is approved: an operator started it.

```
cofuse recurring start FILE  cofuse recurring ls  cofuse recurring show ID  cofuse recurring stop ID
```
"""


if __name__ == "__main__":
    import sys

    sys.stdout.write(as_markdown())
