"""A moment to come, as people say it at the command line."""

import re
from datetime import datetime, time, timedelta
from typing import Final

_UNIT: Final = {"m": "minutes", "h": "hours", "d": "days"}


def moment_of(text: str, now: datetime) -> datetime:
    """The moment that `text` means: the next 08:00, a day and a time, or a length from now on.

    Args: now: with its zone; a text without one is of the same.
    Raises: ValueError for another form, or a moment that is over.
    """
    if length := re.fullmatch(r"([1-9][0-9]{0,4})([mhd])", text):
        return now + timedelta(**{_UNIT[length[2]]: int(length[1])})
    try:
        if re.fullmatch(r"[0-9]{1,2}:[0-9]{2}", text):
            found = datetime.combine(now.date(), time.fromisoformat(text.zfill(5)), now.tzinfo)
            return found if found > now else found + timedelta(days=1)
        found = datetime.fromisoformat(text)
    except ValueError:
        found = None
    if found is None:
        raise ValueError(
            f"found the time {text[:40]!r}, wanted 08:00, 2027-01-31T08:00, 90m, 8h or 2d"
        )
    found = found if found.tzinfo else found.replace(tzinfo=now.tzinfo)
    if found <= now:
        raise ValueError(f"found {text}, which is over; wanted a time to come")
    return found
