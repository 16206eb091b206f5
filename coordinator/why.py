"""Why something is as it is: `cofuse why NAME` in plain words, each with its remedy.

Pure: the facts and the time are given. NAME is a round, a participant, a pivot or a recurring spec.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Final

from coordinator import presence
from coordinator.recurring import Recurring, Standing
from coordinator.round_state import Part, Round
from coordinator.rounds import FINAL, REPORT_GRACE_MS, State
from protos.errors import CofuseError

LOW_DISK_BYTES: Final = 1 << 30
LARGE_SKEW_MS: Final = 60_000


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact in words, and what to do about it; empty when nothing is to be done."""

    says: str
    do: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What is known of a participant at this moment."""

    online: bool
    paused: bool = False
    free_bytes: int | None = None
    """On its disk; None when it has not told."""
    skew_ms: int = 0
    """Its clock less the coordinator's."""
    alarm: str = ""
    """What its audit chain did that no chain does; empty: nothing."""
    awaiting: frozenset[str] = frozenset()
    """Rounds whose finished releases wait for a person there."""
    working: frozenset[str] = frozenset()
    """Rounds that it has taken and not answered."""
    doubled: bool = False
    """Whether attendances of its name keep taking each other's place."""


def seen_of(
    enrolled: Iterable[str],
    attending: Mapping[str, presence.Seen | None],
    alarms: Mapping[str, str],
) -> dict[str, Seen]:
    """What is known of everybody enrolled, of those who attend by their last beat.

    Args: alarms: about audit chains, by participant.
    """
    found = {name: Seen(online=name in attending, alarm=alarms.get(name, "")) for name in enrolled}
    for name, beat in attending.items():
        if beat is not None and name in found:
            found[name] = replace(
                found[name],
                paused=beat.paused,
                free_bytes=beat.free_disk_bytes,
                skew_ms=beat.clock_skew_ms,
                awaiting=beat.awaiting,
                working=beat.working,
                doubled=beat.doubled,
            )
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is needed to explain any name."""

    rounds: Sequence[Round]
    seen: Mapping[str, Seen]
    """Everybody enrolled."""
    pivots: Mapping[str, str]
    """By name, the round that made it or will: empty for one that was imported."""
    recurring: Sequence[Recurring]


def explain(name: str, facts: Facts, now_unix_ms: int) -> tuple[Finding, ...]:
    """Say in what state `name` is, what it waits for, and what would help; the main thing first.

    Raises: CofuseError unknown_name.
    """
    rounds = {round_.round_id: round_ for round_ in facts.rounds}
    recurring = {row.recurring_id: row for row in facts.recurring}
    if name in rounds:
        return tuple(_round(rounds[name], facts, now_unix_ms))
    if name in recurring:
        return tuple(_recurring(recurring[name], facts, now_unix_ms))
    if name in facts.seen:
        return tuple(_participant(name, facts, now_unix_ms))
    if name in facts.pivots:
        return tuple(_pivot(name, facts, now_unix_ms))
    raise CofuseError(
        "unknown_name", f"there is no round, participant, pivot or recurring spec {name[:60]!r}"
    )


def _round(round_: Round, facts: Facts, now: int) -> Iterator[Finding]:
    name, ends = round_.round_id, when(round_.deadline_unix_ms, now)
    match round_.state:
        case State.SUBMITTED:
            do = f"an operator lets it run: cofuse round approve {name}"
            yield Finding(f"{name} waits for approval, and expires {ends}", do)
        case State.APPROVED:
            do = "it takes seconds; if it stays so, the coordinator's log tells why"
            yield Finding(f"{name} is about to ask its participants", do)
        case State.COLLECTING:
            yield from _collecting(round_, facts, now)
        case State.FUSING | State.EVALUATING:
            yield from _fusing(round_, facts, now)
        case State.PUBLISHED:
            made = [pivot for pivot, by in facts.pivots.items() if by == name]
            yield Finding(f"{name} has published {', '.join(made)}")
        case State.EXPIRED:
            do = "submit it again with a longer deadline_minutes, or a smaller quorum"
            yield Finding(f"{name} reached its deadline: {round_.detail}", do)
        case State.FAILED:
            do = "remove what it names, then submit it again"
            yield Finding(f"{name} failed: {round_.detail or 'no quorum could come any more'}", do)
        case _:
            yield Finding(f"{name} was {round_.state.lower()} {round_.detail}".rstrip())
    if round_.state in FINAL and round_.state is not State.PUBLISHED:
        yield from (_ended(part) for part in round_.parts if part.status in ("refused", "failed"))


def _collecting(round_: Round, facts: Facts, now: int) -> Iterator[Finding]:
    have = sum(part.status == "committed" for part in round_.parts)
    still_open = [part for part in round_.parts if part.awaited]
    says = (
        f"{round_.round_id} collects: {have} of {len(round_.parts)} contributions, "
        f"{round_.needed} are needed"
    )
    until = when(round_.collect_unix_ms, now)
    last = when(round_.deadline_unix_ms, now)
    yield Finding(f"{says}; with these it is fused {until} at the latest, else it expires {last}")
    for part in still_open:
        yield _open(part, facts.seen.get(part.participant), now, round_.round_id)
    yield from (_ended(part) for part in round_.parts if part.status in ("refused", "failed"))


def _open(part: Part, seen: Seen | None, now: int, round_id: str) -> Finding:
    name = part.participant
    if part.status == "committed":
        until = when(part.committed_unix_ms + REPORT_GRACE_MS, now)
        return Finding(f"{name} has contributed; its report is waited for, {until} no more")
    if (trouble := _trouble(name, seen)) is not None:
        return trouble
    if seen is not None and round_id in seen.awaiting:
        do = "its operator looks at the release there: cofuse approve; silence is a no after 72 h"
        return Finding(f"{name} has its contribution ready, and waits for its approval there", do)
    again = when(part.lease_unix_ms, now)
    if seen is not None and part.attempt > 1 and not part.detail and round_id not in seen.working:
        do = (
            "let it dial the engine's port too (engine_listen, usually 9443); its own log tells why"
        )
        says = f"{name} is connected, but nothing of the round has reached it in {part.attempt - 1}"
        return Finding(f"{says} attempt{'s' * (part.attempt > 2)}; the next is {again}", do)
    last = f"; last time: {part.detail}" if part.detail else ""
    return Finding(
        f"{name} has been asked (attempt {part.attempt}) and has not answered yet{last}",
        f"wait: if nothing is heard it is asked again {again}; its own log tells what it does",
    )


def _trouble(name: str, seen: Seen | None) -> Finding | None:
    """What keeps a participant from working."""
    if seen is None or not seen.online:
        do = (
            "start it there (cofuse participant up); if it runs, its own log tells whether the "
            "network or a revoked certificate keeps it away"
        )
        return Finding(f"{name} is not connected", do)
    if seen.doubled:
        do = (
            "if a copy of its folder runs elsewhere, stop it there: a participant has one home; "
            "if none does, look at its network, which drops its connection again and again"
        )
        return Finding(f"{name} attends twice: each connection takes the other's place", do)
    if seen.paused:
        return Finding(f"{name} is paused", "its operator resumes it: cofuse participant resume")
    if seen.free_bytes is not None and seen.free_bytes < LOW_DISK_BYTES:
        free = f"{seen.free_bytes / 2**20:.0f} MiB"
        return Finding(f"{name} has {free} of free disk left", "free some of its disk; it goes on")
    if abs(seen.skew_ms) > LARGE_SKEW_MS:
        off = f"{seen.skew_ms / 1000:+.0f} s"
        return Finding(f"{name}'s clock is off by {off}", "set it there: certificates depend on it")
    return None


def _ended(part: Part) -> Finding:
    if part.status == "refused":
        do = "its policy.toml decides: ask its operator, or leave it out of the next round"
        return Finding(f"{part.participant} refused: {part.detail}", do)
    do = "its own log tells more; the next round asks it again"
    return Finding(f"{part.participant} failed: {part.detail}", do)


def _fusing(round_: Round, facts: Facts, now: int) -> Iterator[Finding]:
    name, ends = round_.round_id, when(round_.deadline_unix_ms, now)
    doing = "is fused" if round_.state is State.FUSING else "is evaluated"
    if round_.lease_unix_ms:
        do = f"wait, or end it: cofuse round cancel {name}"
        says = f"{name} {doing} by worker {round_.attempt}, and expires {ends}"
        yield Finding(says, f"follow it: cofuse round watch {name}; {do}")
    else:
        ahead = [
            other.round_id
            for other in facts.rounds
            if other.state in (State.FUSING, State.EVALUATING)
            and other.round_id != name
            and other.lease_unix_ms
        ]
        behind = f"behind {', '.join(ahead)}" if ahead else "and begins in seconds"
        do = f"wait, or make room: cofuse round cancel {ahead[0]}" if ahead else ""
        yield Finding(f"{name} waits for its turn to fuse, {behind}; it expires {ends}", do)
    if round_.losses:
        do = "give the coordinator more memory or disk, or ask for fewer controls"
        yield Finding(f"{round_.losses} of its workers were lost. {round_.detail}".rstrip(), do)


def _participant(name: str, facts: Facts, now: int) -> Iterator[Finding]:
    if facts.seen[name].alarm:
        do = (
            "it was restored from a backup or tampered with: ask its data officer, and compare "
            "its export (cofuse audit export) with ours; then: cofuse audit accept HOME --why ..."
        )
        yield Finding(f"{name}: {facts.seen[name].alarm}", do)
    trouble = _trouble(name, facts.seen[name])
    yield trouble or Finding(f"{name} is connected")
    for round_ in facts.rounds:
        if round_.state is not State.COLLECTING:
            continue
        for part in round_.parts:
            if part.participant == name:
                where = f"in {round_.round_id}: "
                if part.awaited and trouble is not None:
                    yield Finding(f"{where}it is asked, attempt {part.attempt}")
                elif part.awaited:
                    found = _open(part, facts.seen[name], now, round_.round_id)
                    yield Finding(where + found.says, found.do)
                else:
                    yield Finding(f"{where}{part.status} {part.detail}".rstrip())


def _pivot(name: str, facts: Facts, now: int) -> Iterator[Finding]:
    made_by = next((r for r in facts.rounds if r.round_id == facts.pivots[name]), None)
    if made_by is None:
        says = f"{name} is of no round: an operator imported it, or rolled back to it"
        yield Finding(says, f"take it home: cofuse pivot pull {name}")
    elif made_by.state is State.PUBLISHED:
        says = f"{name} was published by {made_by.round_id}"
        yield Finding(says, f"take it home: cofuse pivot pull {name}")
    else:
        yield Finding(f"{name} is not there: the name is kept for what {made_by.round_id} makes")
        yield from _round(made_by, facts, now)


def _recurring(recurring: Recurring, facts: Facts, now: int) -> Iterator[Finding]:
    name = recurring.recurring_id
    if recurring.state is Standing.STOPPED:
        yield Finding(f"{name} is stopped {recurring.detail}".rstrip(), "start it again to go on")
        return
    due = when(recurring.due_unix_ms, now)
    if recurring.due_unix_ms > now:
        yield Finding(f"{name} makes its next round {due}")
    else:
        waits = recurring.detail or "makes its round now"
        yield Finding(f"{name} has been due {due}; it {waits}", "wait, or lower newer_experts")
    last = next((r for r in facts.rounds if r.round_id == recurring.last_round_id), None)
    if last is not None:
        yield from _round(last, facts, now)


def when(unix_ms: int, now_unix_ms: int) -> str:
    """A moment, in words: "at 14:05 UTC (in 12 min)"."""
    moment = datetime.fromtimestamp(unix_ms / 1000, UTC)
    today = datetime.fromtimestamp(now_unix_ms / 1000, UTC).date() == moment.date()
    stamp = moment.strftime("%H:%M UTC" if today else "%Y-%m-%d %H:%M UTC")
    seconds = abs(unix_ms - now_unix_ms) // 1000
    units = ((86_400, "d"), (3_600, "h"), (60, "min"))
    size, unit = next(((s, u) for s, u in units if seconds >= 2 * s), (1, "s"))
    much = f"{seconds // size} {unit}"
    return f"at {stamp} ({f'in {much}' if unix_ms >= now_unix_ms else f'{much} ago'})"
