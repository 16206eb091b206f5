"""A time that people say is the next moment of that name, and never one that is over."""

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cofuse.moments import moment_of

NOW = datetime(2026, 11, 21, 22, 10, tzinfo=timezone(timedelta(hours=1)))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("08:00", "2026-11-22T08:00+01:00"),
        ("8:00", "2026-11-22T08:00+01:00"),
        ("23:30", "2026-11-21T23:30+01:00"),
        ("2027-01-31T08:00", "2027-01-31T08:00+01:00"),
        ("2027-01-31T08:00+00:00", "2027-01-31T08:00+00:00"),
        ("90m", "2026-11-21T23:40+01:00"),
        ("2d", "2026-11-23T22:10+01:00"),
    ],
)
def test_it_is_read_as_people_mean_it(text: str, wanted: str) -> None:
    assert moment_of(text, NOW) == datetime.fromisoformat(wanted)


@pytest.mark.parametrize("text", ["", "0h", "8", "25:00", "tomorrow", "2020-01-01T00:00", "-5m"])
def test_anything_else_is_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(ValueError, match="wanted"):
        moment_of(text, NOW)


@given(st.times(), st.datetimes(max_value=datetime(9000, 1, 1), timezones=st.just(UTC)))
def test_an_hour_of_the_day_comes_within_a_day(at: object, now: datetime) -> None:
    found = moment_of(f"{at:%H:%M}", now)
    assert timedelta() < found - now <= timedelta(days=1)
