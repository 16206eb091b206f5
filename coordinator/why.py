"""Why a round or a participant does not go on, in plain words with the remedy. Pure."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from coordinator.rounds import State
from coordinator.store import ContributionRow, ParticipantRow, RoundRow
from protos.spec import RoundSpec


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that was found."""

    says: str
    do: str = ""
    """What helps; empty: nothing needs to be done."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """Where something stands, and why; the first reason weighs most."""

    state: str
    reasons: tuple[Reason, ...] = ()


def explain(
    row: RoundRow, parts: Sequence[ContributionRow], *, online: Collection[str], now_unix_ms: int
) -> Explanation:
    """Explain a round.

    Args: online: participants that are connected now.
    """
    left = (row.deadline_unix_ms - now_unix_ms) / 60_000
    state = f"{row.round_id} is {row.state}"
    if row.state is State.SUBMITTED:
        words = f"nobody has approved it yet; it ends by itself in {left:.0f} minutes"
        return Explanation(
            state, (Reason(words, f"an operator runs: cofuse round approve {row.round_id}"),)
        )
    if row.state is State.COLLECTING:
        spec = RoundSpec.model_validate_json(row.spec_json)
        here = sum(part.status == "committed" for part in parts)
        state += f": {here} of {spec.needed} contributions are here, {left:.0f} minutes are left"
        return Explanation(state, tuple(_answer(part, online) for part in _silent_first(parts)))
    if row.state in (State.APPROVED, State.FUSING, State.EVALUATING):
        return Explanation(state, (Reason("the coordinator works on it, one round at a time"),))
    reason = Reason(row.detail, "submit it again once that is cured")
    told = row.detail and row.state is not State.PUBLISHED
    return Explanation(state, (reason,) if told else ())


def explain_participant(
    row: ParticipantRow, *, online: bool, open_rounds: Sequence[str]
) -> Explanation:
    """Explain a participant.

    Args: open_rounds: ids of the rounds that wait for it.
    """
    state = f"{row.name} is {'connected' if online else 'not connected'}"
    waits = (
        f"it is waited for by {', '.join(open_rounds)}" if open_rounds else "no round waits for it"
    )
    return Explanation(
        state, (Reason(waits, "" if online or not open_rounds else _start(row.name)),)
    )


def _silent_first(parts: Sequence[ContributionRow]) -> list[ContributionRow]:
    return sorted(parts, key=lambda part: (part.status == "committed", part.status != "assigned"))


def _answer(part: ContributionRow, online: Collection[str]) -> Reason:
    name = part.participant
    if part.status == "committed":
        return Reason(f"{name} has answered")
    if part.status == "assigned" and name in online:
        return Reason(f"{name} is connected and has not answered yet (attempt {part.attempt})")
    if part.status == "assigned":
        return Reason(f"{name} has not answered and is not connected", _start(name))
    return Reason(f"{name} {part.status}: {part.detail}", f"settle that with {name}; submit again")


def _start(name: str) -> str:
    return f"ask {name} to start its participant: cofuse participant up"
