"""What one side remembers of the other's audit chain: a chain that goes back was tampered with.

Pure. Each side writes the other's last head down where the other cannot reach it. Whoever restores
an old state, to regain a budget or to unsay a record, shows a head that was passed already.
"""

import re
from dataclasses import dataclass, replace
from typing import Final

from trust.chain import Entry, Head, utc

NOTE_MS: Final = 3_600_000
"""How often what was seen also becomes a record of the own chain: evidence that is signed. Each
record moves the own head, which the other side notes in turn; so not at every word."""
_HASH: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Anchor:
    """The last head that was seen of another's chain."""

    seq: int
    head: str
    noted_unix_ms: int
    """When it last became a record of the own chain."""
    alarm: str = ""
    """The last time that it went back, in words; it stays until somebody has accepted it."""


def is_head(seq: int, head: str) -> bool:
    """Whether foreign values could be the head of a chain that has records."""
    return 0 < seq < 2**53 and _HASH.fullmatch(head) is not None


def anchor_entry(by: str, whose: str, before: Anchor | None, after: Anchor) -> Entry:
    """What was seen, as a record of the own chain. Args: by: whose chain that is."""
    is_alarm = after.alarm != (before.alarm if before else "")
    data = {"seq": after.seq, "head": after.head}
    return Entry(
        actor=by,
        act="anchor.alarm" if is_alarm else "anchor.seen",
        obj=whose,
        res="deny" if is_alarm else "ok",
        why=after.alarm if is_alarm else "",
        data=data,
    )


def acceptance(by: str, whose: str, before: Anchor, why: str) -> Entry:
    """That somebody has looked into an alarm, as a record of the own chain."""
    data = {"seq": before.seq, "head": before.head, "alarm": before.alarm}
    return Entry(actor=by, act="anchor.accepted", obj=whose, why=why, data=data)


def witness(before: Anchor | None, head: Head, now_unix_ms: int) -> tuple[Anchor, bool]:
    """Take a head that is_head().

    Returns: what to remember, and whether it should become a record: a first sight, an alarm, or
        when the last one is long ago.
    """
    if before is None:
        return Anchor(head.seq, head.h, now_unix_ms), True
    if head == (before.seq, before.head):
        return before, False
    if head.seq <= before.seq:
        was, now = f"record {before.seq} ({before.head[:12]})", f"{head.seq} ({head.h[:12]})"
        alarm = f"its audit chain went back from {was} to {now} at {utc(now_unix_ms)}"
        return Anchor(head.seq, head.h, now_unix_ms, alarm), True
    due = not before.noted_unix_ms <= now_unix_ms < before.noted_unix_ms + NOTE_MS
    noted = now_unix_ms if due else before.noted_unix_ms
    return replace(before, seq=head.seq, head=head.h, noted_unix_ms=noted), due
