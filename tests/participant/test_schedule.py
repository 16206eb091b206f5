"""When the expert trains: windows, and what a session adds."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fp8.train import TrainResult
from participant.config import ModelConfig, ParticipantConfig, TrainingConfig
from participant.schedule import DAYS, ScheduleConfig
from participant.stages.cpt import ExpertFacts
from participant.training import Training
from protos.config import TlsConfig

NIGHT = ScheduleConfig(days=("mon", "fri"), start="20:00", end="06:00", time_zone="Europe/Berlin")
BERLIN = ZoneInfo("Europe/Berlin")
CLOCKS = st.times().map(lambda t: t.strftime("%H:%M"))
MOMENTS = st.datetimes(
    datetime(2026, 1, 1), datetime(2027, 1, 1), timezones=st.just(UTC)
)  # with both clock changes


@pytest.mark.parametrize(
    ("moment", "is_open"),
    [
        ("2026-11-23T19:59", False),  # Monday
        ("2026-11-23T20:00", True),
        ("2026-11-24T05:59", True),  # Tuesday, in Monday's night
        ("2026-11-24T06:00", False),
        ("2026-11-24T23:00", False),
        ("2026-11-27T23:00", True),  # Friday
        ("2026-11-28T03:00", True),
    ],
)
def test_a_night_belongs_to_the_day_on_which_it_begins(moment: str, is_open: bool) -> None:
    now = datetime.fromisoformat(moment).replace(tzinfo=BERLIN)
    assert (NIGHT.window(now) is not None) == is_open
    assert (NIGHT.window(now.astimezone(UTC)) is not None) == is_open


@given(MOMENTS)
def test_without_a_schedule_training_may_always_run(now: datetime) -> None:
    assert ScheduleConfig().window(now) is not None


@given(
    MOMENTS,
    CLOCKS,
    CLOCKS,
    st.sets(st.sampled_from(DAYS), min_size=1),
    st.sampled_from(["UTC", "Europe/Berlin"]),
)
def test_the_next_window_is_the_first_moment_that_is_open_again(
    now: datetime, start: str, end: str, days: set[str], zone: str
) -> None:
    schedule = ScheduleConfig(start=start, end=end, days=tuple(sorted(days)), time_zone=zone)  # type: ignore[arg-type]
    opens = schedule.next_window(now)
    assert now < opens <= now + timedelta(days=8)
    hour = opens.replace(tzinfo=None)
    exists = opens.astimezone(UTC).astimezone(ZoneInfo(zone)).replace(tzinfo=None) == hour
    if exists:  # not in the hour that a clock change leaves out
        assert schedule.window(opens) == opens
    if schedule.window(now) is None:
        for part in range(1, 8):
            between = now + (opens - now) * part / 8
            assert schedule.window(between) is None or between >= opens


@pytest.mark.parametrize(
    "wrong", [{"start": "24:00"}, {"end": "6"}, {"days": []}, {"time_zone": "Moon"}, {"x": 1}]
)
def test_a_schedule_that_means_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ScheduleConfig.model_validate(wrong)


# --- sessions -------------------------------------------------------------------------------


class Pupil:
    """An expert's facts, and a training that does as many steps as it is let."""

    def __init__(self) -> None:
        self.done = ExpertFacts()
        self.asked: list[int] = []
        self.steps_allowed = 10**6

    def facts(self) -> ExpertFacts:
        return self.done

    def pretrain(self, config: TrainingConfig, **_: object) -> TrainResult:
        self.asked.append(config.steps)
        finished = config.steps <= self.steps_allowed
        if finished:
            self.done = ExpertFacts(version=self.done.version + 1, steps=config.steps)
        return TrainResult(config.steps, [], finished, 0)


class Night:
    """A training whose clock the test moves; started anew, it knows what is on disk."""

    def __init__(self, folder: Path, more_steps: int) -> None:
        self.now = datetime(2026, 11, 23, 19, tzinfo=UTC)
        self.pupil = Pupil()
        schedule = {"start": "20:00", "end": "06:00", "time_zone": "UTC", "more_steps": more_steps}
        self.config = ParticipantConfig(
            name="a",
            coordinator="localhost:1",
            corpus=folder / "c",
            data_dir=folder,
            policy=folder / "p",
            model=ModelConfig(
                architecture="llama", hidden_size=32, layers=1, heads=1, vocab_size=300
            ),
            training=TrainingConfig(steps=100),
            schedule=ScheduleConfig.model_validate(schedule),
            tls=TlsConfig(ca=folder, certificate=folder, key=folder),
        )

    def training(self) -> Training:
        return Training(self.config, self.pupil, lambda: self.now)  # type: ignore[arg-type]

    def run(self) -> None:
        self.training().run(on_progress=lambda _: None, should_stop=lambda: False)


def test_each_night_adds_its_steps_once(tmp_path: Path) -> None:
    night = Night(tmp_path, more_steps=30)
    assert not night.training().due()
    night.now += timedelta(hours=2)
    for expected in (100, 130):  # the first night finishes the expert, and has time for more
        assert night.training().due()
        night.run()
        assert night.pupil.done.steps == expected
    assert not night.training().due()
    night.now += timedelta(days=1)
    assert night.training().due()
    night.run()
    assert night.pupil.done.steps == 160
    assert not night.training().due()


def test_a_session_cut_short_goes_on_in_the_next_night_and_no_steps_are_added_twice(
    tmp_path: Path,
) -> None:
    night = Night(tmp_path, more_steps=30)
    night.now += timedelta(hours=2)
    night.run()
    night.pupil.steps_allowed = 100
    night.run()  # cut short
    night.now += timedelta(days=1)
    night.pupil.steps_allowed = 10**6
    night.run()
    assert night.pupil.asked == [100, 130, 130]


def test_without_more_steps_a_finished_expert_rests(tmp_path: Path) -> None:
    night = Night(tmp_path, more_steps=0)
    night.now += timedelta(hours=2)
    night.run()
    night.now += timedelta(days=3)
    assert not night.training().due()


def test_a_session_that_an_older_release_began_goes_on(tmp_path: Path) -> None:
    """It was kept in the data folder itself, where the trainer may write no more."""
    old = {"window": "2026-11-22T20:00:00+00:00", "steps": 120}
    (tmp_path / "session.json").write_text(json.dumps(old), encoding="utf-8")
    night = Night(tmp_path, more_steps=30)
    night.pupil.done = ExpertFacts(version=1, steps=100)
    night.now += timedelta(hours=2)
    night.run()
    assert night.pupil.asked == [120]
