"""What a round may become. The whole truth is here; docs/rounds.md is drawn from the table.

Pure: no clock, no database, no wire. `step` takes what is stored, what has happened and what time
it is, and returns what is to be stored. `duties` says what must be going on while it is stored:
levels, not edges, so whoever executes them derives them again after a restart and loses nothing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

from coordinator.happenings import (
    Broke,
    Committed,
    Decided,
    Evaluated,
    Fused,
    Happening,
    Heard,
    Lost,
    Reported,
    Restarted,
    Tick,
    Worked,
)
from coordinator.happenings import Event as Event  # the table's two alphabets are found here too
from coordinator.round_state import Deliver, Duty, Fuse, Part, Round
from coordinator.round_state import State as State

_S, _E = State, Event
TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = {
    (_S.SUBMITTED, _E.APPROVE): _S.APPROVED,
    (_S.SUBMITTED, _E.REJECT): _S.REJECTED,
    (_S.SUBMITTED, _E.CANCEL): _S.CANCELLED,
    (_S.SUBMITTED, _E.DEADLINE_PASSED): _S.EXPIRED,
    (_S.APPROVED, _E.ISSUE): _S.COLLECTING,
    (_S.APPROVED, _E.CANCEL): _S.CANCELLED,
    (_S.APPROVED, _E.DEADLINE_PASSED): _S.EXPIRED,
    (_S.COLLECTING, _E.COLLECTED): _S.FUSING,
    (_S.COLLECTING, _E.QUORUM_MISSED): _S.FAILED,
    (_S.COLLECTING, _E.DEADLINE_PASSED): _S.EXPIRED,
    (_S.COLLECTING, _E.FAIL): _S.FAILED,
    (_S.COLLECTING, _E.CANCEL): _S.CANCELLED,
    (_S.FUSING, _E.FUSED): _S.EVALUATING,
    (_S.FUSING, _E.DEADLINE_PASSED): _S.EXPIRED,
    (_S.FUSING, _E.FAIL): _S.FAILED,
    (_S.FUSING, _E.CANCEL): _S.CANCELLED,
    (_S.EVALUATING, _E.EVALUATED): _S.PUBLISHED,
    (_S.EVALUATING, _E.DEADLINE_PASSED): _S.EXPIRED,
    (_S.EVALUATING, _E.FAIL): _S.FAILED,
    (_S.EVALUATING, _E.CANCEL): _S.CANCELLED,
}
FINAL: Final = frozenset(State) - {state for state, _ in TRANSITIONS}

ASSIGNMENT_LEASE_MS: Final = 600_000
"""An assignment of which nothing is heard goes out again after this: a message can be lost."""
FUSION_LEASE_MS: Final = 300_000
"""A fusion worker that neither computes nor speaks for this long is ended, and another starts."""
RETRY_MS: Final = 1_000
"""The first pause after a loss that was noticed; a worker's doubles, up to a minute."""
REPORT_GRACE_MS: Final = 120_000
"""How long a report may trail behind its contribution before the round goes on without it."""
MAX_LOSSES: Final = 10
"""Workers that one round may lose; then it fails, for the next one would be lost as well."""


class IllegalTransitionError(ValueError):
    """The event means nothing in this state."""


class CommitRefusedError(ValueError):
    """The round takes no such contribution now; the message says why."""


def advance(state: State, event: Event) -> State:
    """Return the state after `event`.

    Raises: IllegalTransitionError naming the events this state knows.
    """
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        known = ", ".join(e for s, e in TRANSITIONS if s is state) or "none: it is final"
        raise IllegalTransitionError(
            f"a round in {state} does not take {event!r}; it takes: {known}"
        ) from None


def step(round_: Round, happening: Happening, now_unix_ms: int) -> tuple[Round, frozenset[Duty]]:
    """Return what the round is after a happening, and what must be going on from now on.

    Happenings are facts, and change what they tell of; conclusions (enough contributions, a lease
    or a deadline that has passed) are drawn by Tick alone. What belongs to another attempt, or
    comes twice, changes nothing. All but Tick and Restarted leave other participants' parts alone,
    so the parts given may then be the one concerned.

    Raises: IllegalTransitionError for a decision or an evaluation that the state does not take.
        CommitRefusedError.
    """
    after = _take(round_, happening, now_unix_ms)
    return after, duties(after)


def duties(round_: Round) -> frozenset[Duty]:
    """What must be going on; whatever else goes on for this round must end."""
    name = round_.round_id
    if round_.state is State.COLLECTING:
        return frozenset(Deliver(name, p.participant, p.attempt) for p in round_.parts if p.awaited)
    if round_.state in (State.FUSING, State.EVALUATING):
        return frozenset({Fuse(name, round_.attempt)})
    return frozenset()


def _take(round_: Round, happening: Happening, now: int) -> Round:
    match happening:
        case Tick():
            return _conclude(round_, now)
        case Restarted():
            return _restart(round_, now)
        case Decided(event, detail):
            return _move(round_, event, detail, now)
        case Committed() | Reported() | Heard() | Lost():
            return _take_part(round_, happening, now)
        case Evaluated(attempt) if attempt == round_.attempt:
            return _move(round_, Event.EVALUATED, "", now)
        case Evaluated(attempt):
            raise IllegalTransitionError(
                f"found the result of worker {attempt}, wanted that of {round_.attempt}"
            )
        case Fused() | Worked() | Broke():
            return _take_work(round_, happening, now)


def _move(round_: Round, event: Event, detail: str, now: int) -> Round:
    after = replace(round_, state=advance(round_.state, event), detail=detail)
    if event is Event.ISSUE:
        return replace(after, parts=_asked(round_.participants, now))
    if event is Event.COLLECTED:
        return replace(after, attempt=1, lease_unix_ms=0, losses=0)
    return after


# --- one participant -------------------------------------------------------------------------


def _take_part(round_: Round, happening: Committed | Reported | Heard | Lost, now: int) -> Round:
    part = next((p for p in round_.parts if p.participant == happening.participant), None)
    if isinstance(happening, Committed):
        if part is None:
            raise CommitRefusedError(f"{round_.round_id} does not name {happening.participant!r}")
        after = _commit(round_, part, happening, now)
    elif part is None or round_.state is not State.COLLECTING:
        return round_  # what is fused is settled
    else:
        after = _listen(part, happening, now)
    return replace(round_, parts=tuple(after if p is part else p for p in round_.parts))


def _commit(round_: Round, part: Part, made: Committed, now: int) -> Part:
    """The first contribution stands, whichever attempt it was made in."""
    if part.status == "committed":
        if part.sha256 != made.sha256:
            raise CommitRefusedError(
                f"{round_.round_id} already holds {part.sha256[:12]} of {part.participant!r}"
            )
        return part
    if round_.state is not State.COLLECTING or part.status != "assigned":
        raise CommitRefusedError(
            f"{round_.round_id} is {round_.state} and {part.participant!r} {part.status}: "
            "it takes no contribution now"
        )
    return replace(
        part,
        status="committed",
        sha256=made.sha256,
        size_bytes=made.size_bytes,
        committed_unix_ms=now,
        # Whose attempt has ended in words (it waited for a person, or was lost) reports to nobody
        # now: it is asked again. The others' reports are on their way.
        lease_unix_ms=now if part.detail else part.lease_unix_ms,
        detail="",
    )


def _listen(part: Part, happening: Reported | Heard | Lost, now: int) -> Part:
    if part.status == "committed":
        # Nothing undoes it, and whichever attempt tells of it tells the same.
        if isinstance(happening, Reported) and happening.status != "waiting":
            return replace(part, report_json=happening.body)
        return part
    if part.status != "assigned" or happening.attempt not in (None, part.attempt):
        return part  # an older attempt's; the newer one is at work
    match happening:
        case Reported(_, _, status, detail, body):
            ended = status if status in ("refused", "failed") else "assigned"
            last = "" if status == "waiting" else body  # not its last word
            return replace(part, status=ended, detail=detail, report_json=last)
        case Lost(_, _, detail):
            soon = min(part.lease_unix_ms, now + RETRY_MS)
            return replace(part, lease_unix_ms=soon, detail=detail)
        case Heard():  # not every word: a lease is on disk, and half of one is long enough
            fresh = _fresh(part.lease_unix_ms, now, ASSIGNMENT_LEASE_MS)
            return part if fresh else replace(part, lease_unix_ms=now + ASSIGNMENT_LEASE_MS)


# --- the fusion worker -----------------------------------------------------------------------


def _take_work(round_: Round, happening: Fused | Worked | Broke, now: int) -> Round:
    working = round_.state in (State.FUSING, State.EVALUATING)
    if not working or happening.attempt != round_.attempt:
        return round_
    match happening:
        case Fused():
            again = round_.state is State.EVALUATING
            return round_ if again else _move(round_, Event.FUSED, "", now)
        case Worked():
            if _fresh(round_.lease_unix_ms, now, FUSION_LEASE_MS):
                return round_
            detail = round_.detail if round_.lease_unix_ms else ""  # of the former worker
            return replace(round_, lease_unix_ms=now + FUSION_LEASE_MS, detail=detail)
        case Broke(_, detail, lost):
            if not lost:
                return _move(round_, Event.FAIL, detail, now)
            pause = min(RETRY_MS << round_.losses, 60_000)
            return replace(round_, lease_unix_ms=now + pause, detail=detail)


# --- conclusions -----------------------------------------------------------------------------


def _conclude(round_: Round, now: int) -> Round:
    """What follows from the time alone. Repeating it at the same time changes nothing more."""
    if round_.state in FINAL:
        return round_
    if now >= round_.deadline_unix_ms:
        return _move(round_, Event.DEADLINE_PASSED, round_.missing, now)
    if round_.state is State.APPROVED:
        return _move(round_, Event.ISSUE, "", now)
    if round_.state is State.COLLECTING:
        event = outcome(round_, now)
        if event is not None:
            return _move(round_, event, round_.answers, now)
        return replace(round_, parts=tuple(_ask_again(part, now) for part in round_.parts))
    if round_.lease_unix_ms and _over(round_.lease_unix_ms, now, FUSION_LEASE_MS):
        return _lose(round_, now)
    return round_


def outcome(round_: Round, now: int) -> Event | None:
    """What the collection amounts to before the deadline, or None while it goes on."""
    committed = sum(part.status == "committed" for part in round_.parts)
    still_open = sum(part.status == "assigned" for part in round_.parts)
    if committed + still_open < round_.needed:
        return Event.QUORUM_MISSED
    if committed < round_.needed:
        return None
    late = any(
        part.awaited
        and (part.status == "assigned" or now < part.committed_unix_ms + REPORT_GRACE_MS)
        for part in round_.parts
    )
    return None if late and now < round_.collect_unix_ms else Event.COLLECTED


def _over(lease_unix_ms: int, now: int, longest_ms: int) -> bool:
    """Whether a lease has ended. One that ends too far ahead is older than a jump of the clock."""
    return not now < lease_unix_ms <= now + longest_ms


def _fresh(lease_unix_ms: int, now: int, longest_ms: int) -> bool:
    return now + longest_ms // 2 < lease_unix_ms <= now + longest_ms


def _ask_again(part: Part, now: int) -> Part:
    if not part.awaited or not _over(part.lease_unix_ms, now, ASSIGNMENT_LEASE_MS):
        return part
    return _again(part, now)


def _asked(names: Iterable[str], now: int) -> tuple[Part, ...]:
    lease = now + ASSIGNMENT_LEASE_MS
    return tuple(Part(participant=name, lease_unix_ms=lease) for name in sorted(names))


def _again(part: Part, now: int) -> Part:
    return replace(part, attempt=part.attempt + 1, lease_unix_ms=now + ASSIGNMENT_LEASE_MS)


def _lose(round_: Round, now: int) -> Round:
    losses = round_.losses + 1
    why = round_.detail or f"nothing was heard of it for {FUSION_LEASE_MS // 1000} s"
    if losses >= MAX_LOSSES:
        return _move(round_, Event.FAIL, f"{losses} fusion workers were lost; the last: {why}", now)
    return replace(round_, attempt=round_.attempt + 1, lease_unix_ms=0, losses=losses)


def _restart(round_: Round, now: int) -> Round:
    """No loss of anybody's: what is open gets a new attempt, which no former one can be."""
    if round_.state is State.COLLECTING:
        # Release 0.1 wrote a round's state and its assignments in two transactions.
        known = {part.participant for part in round_.parts}
        fresh = _asked((name for name in round_.participants if name not in known), now)
        again = (_again(part, now) if part.awaited else part for part in round_.parts)
        return replace(round_, parts=(*again, *fresh))
    if round_.state in (State.FUSING, State.EVALUATING):
        return replace(round_, attempt=round_.attempt + 1, lease_unix_ms=0)
    return round_
