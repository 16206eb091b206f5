"""The coordinator's clock: the wall's when the process starts, and steady from then on.

A wall clock that jumps (set by hand, corrected after a boot) would end rounds before their time,
or never. This one counts on from its start, a suspended machine's time included; after a restart
the wall clock counts again.
"""

import time
from typing import Final


def _elapsed_ns() -> int:
    """Nanoseconds that no setting of the clock changes; Linux's count goes on in a suspend."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    return time.monotonic_ns()


_START_NS: Final = time.time_ns() - _elapsed_ns()


def now_unix_ms() -> int:
    """The time, UTC, in ms since 1970. It never jumps while the process lives."""
    return (_START_NS + _elapsed_ns()) // 1_000_000


def jumped_ms() -> int:
    """By how much the wall clock has moved away since the process started."""
    return time.time_ns() // 1_000_000 - now_unix_ms()
