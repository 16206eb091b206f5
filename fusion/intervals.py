"""How far a share of questions answered right may be from the model's true share."""

import math
from typing import Final

_Z: Final = 1.959964
"""Of 95 %, both sides."""


def interval_or_none(share: float, of: int) -> tuple[float, float] | None:
    """Return share_interval, and None for numbers that are no share: they may be anybody's word."""
    return share_interval(share, of) if 0 <= share <= 1 and of > 0 else None


def share_interval(share: float, of: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of `of` independent trials, in [0, 1].

    Unlike share +- 1.96 standard errors it is no point at 0 and 1, and holds for few trials.
    Raises: ValueError for a share outside of [0, 1] or no trial.
    Source: Wilson's score interval (1927).
    """
    if not 0 <= share <= 1 or of < 1:
        raise ValueError(f"found a share of {share} of {of}, wanted one in [0, 1] of at least 1")
    spread = _Z * math.sqrt(share * (1 - share) / of + _Z**2 / (4 * of**2))
    middle, scale = share + _Z**2 / (2 * of), 1 + _Z**2 / of
    # Rounding must not leave a share of 0 or 1 outside of its own interval.
    low, high = (middle - spread) / scale, (middle + spread) / scale
    return max(0.0, min(share, low)), min(1.0, max(share, high))
