"""How often one caller may call: a bucket of tokens for each, filled at a steady rate."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MAX_CALLERS: Final = 10_000
"""More than this and full buckets, whose owners lose nothing by it, are forgotten."""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class Rates:
    """Tokens by caller. For one event loop; no lock."""

    def __init__(
        self, per_s: float, burst: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._per_s = per_s
        self._burst = burst
        self._clock = clock
        self._buckets: dict[str, _Bucket] = {}

    def take(self, caller: str) -> bool:
        """Whether the caller may call now."""
        now = self._clock()
        if len(self._buckets) > MAX_CALLERS:
            self._forget_full(now)
        bucket = self._buckets.setdefault(caller, _Bucket(self._burst, now))
        bucket.tokens = self._level(bucket, now)
        bucket.filled_at = now
        if bucket.tokens < 1:
            return False
        bucket.tokens -= 1
        return True

    def _level(self, bucket: _Bucket, now: float) -> float:
        return min(self._burst, bucket.tokens + (now - bucket.filled_at) * self._per_s)

    def _forget_full(self, now: float) -> None:
        for caller, bucket in list(self._buckets.items()):
            if self._level(bucket, now) >= self._burst:
                del self._buckets[caller]
