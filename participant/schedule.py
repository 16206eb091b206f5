"""When the expert trains by itself: on some days, between two times of the day."""

from datetime import datetime, time, timedelta
from typing import Annotated, Final, Literal
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field, StringConstraints

from protos.config import StrictConfig

Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
DAYS: Final[tuple[Day, ...]] = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
Clock = Annotated[str, StringConstraints(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]


def _known_zone(name: str) -> str:
    if name:
        try:
            ZoneInfo(name)
        except (ValueError, OSError, KeyError) as error:
            raise ValueError(
                f"found the time zone {name!r}, wanted one like Europe/Berlin"
            ) from error
    return name


class ScheduleConfig(StrictConfig):
    """[schedule]: when training may run. Rounds are served at any time; pausing stops both."""

    days: tuple[Day, ...] = Field(default=DAYS, min_length=1)
    """Days on which a window opens."""
    start: Clock = "00:00"
    """Local time at which it opens."""
    end: Clock = "00:00"
    """Local time at which it closes; not after `start`: on the next day."""
    time_zone: Annotated[str, AfterValidator(_known_zone)] = ""
    """IANA name; empty: the machine's own."""
    more_steps: int = Field(default=0, ge=0)
    """Steps to add each time a window opens, once the expert is finished; 0: it rests then."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of this training; default: those of all work."""
    gpu_memory_share: float = Field(default=1.0, gt=0, le=1)
    """Part of each GPU's memory that this process may take."""

    def window(self, now: datetime) -> datetime | None:
        """When the window that is open at `now` opened; None when none is open.

        Args: now: aware. Times are wall times of the zone, so a night with a clock change is an
            hour longer or shorter.
        """
        local = self._local(now)
        for back in (timedelta(0), timedelta(days=1)):
            opened, closes = self._bounds(local - back)
            if opened <= local < closes and DAYS[opened.weekday()] in self.days:
                return opened
        return None

    def next_window(self, now: datetime) -> datetime:
        """When the next window opens, strictly after `now`."""
        local = self._local(now)
        for ahead in range(9):
            opened, _ = self._bounds(local + timedelta(days=ahead))
            if opened > local and DAYS[opened.weekday()] in self.days:
                return opened
        raise AssertionError("a week without any of its days")

    def _local(self, now: datetime) -> datetime:
        return now.astimezone(ZoneInfo(self.time_zone) if self.time_zone else None)

    def _bounds(self, day: datetime) -> tuple[datetime, datetime]:
        start, end = time.fromisoformat(self.start), time.fromisoformat(self.end)
        opened = datetime.combine(day.date(), start, day.tzinfo)
        last = day.date() + timedelta(days=int(end <= start))
        return opened, datetime.combine(last, end, day.tzinfo)
