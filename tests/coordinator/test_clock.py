"""The coordinator's clock never jumps, whatever is done to the wall's."""

import time
from datetime import UTC, datetime, timedelta

import pytest
import time_machine

from coordinator import clock


def test_it_is_the_walls_time_when_the_process_starts() -> None:
    assert abs(clock.now_unix_ms() - time.time() * 1000) < 1000
    assert abs(clock.jumped_ms()) < 1000


@pytest.mark.parametrize("days", [-1, 1])
def test_a_jump_of_the_wall_clock_is_told_and_not_followed(days: int) -> None:
    before = clock.now_unix_ms()
    with time_machine.travel(datetime.now(UTC) + timedelta(days=days)):
        assert 0 <= clock.now_unix_ms() - before < 5_000
        assert abs(clock.jumped_ms() - days * 86_400_000) < 5_000
