"""The recurring spec: when a round is made again, and which. Strict data, like the round's."""

import re
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from protos.faults import with_lines
from protos.spec import Name, RoundSpec, SpecError, Strict, first_message, parse_spec
from protos.yaml_text import read_yaml

_NAMES: Final = re.compile(
    "sun|mon|tue|wed|thu|fri|sat|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec"
)
"""The words of a calendar; croniter knows others, which draw a time at random."""


class RecurringSpec(Strict):
    """Rounds by the calendar."""

    name: Name
    """A name for people; its id is the coordinator's."""
    every: str = Field(max_length=100)
    """When: minute, hour, day of month, month, day of week ("0 2 * * sun": Sundays at two)."""
    timezone: str = Field(default="UTC", max_length=64)
    """Of `every`, as the IANA names it ("Europe/Paris")."""
    newer_experts: int = Field(default=0, ge=0)
    """A round waits until so many of its participants' experts have changed since a pivot last
    learned from them."""
    round: RoundSpec
    """What is made each time. Its pivot is where the first one starts; each later one starts from
    the newest pivot that has come of it."""

    @field_validator("every")
    @classmethod
    def _a_calendar(cls, value: str) -> str:
        words = re.findall("[a-z]+", value.lower())
        named = all(_NAMES.fullmatch(word) for word in words)
        if len(value.split()) != 5 or not named or not _comes(value):
            raise ValueError(
                "wanted five fields: minute, hour, day of month, month, day of week, "
                'as in "0 2 * * sun"'
            )
        return value

    @field_validator("timezone")
    @classmethod
    def _a_place(cls, value: str) -> str:
        try:
            ZoneInfo(value)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ValueError('wanted a name such as "UTC" or "Europe/Paris"') from error
        return value

    @model_validator(mode="after")
    def _consistent(self) -> "RecurringSpec":
        if self.newer_experts > len(self.round.participants):
            raise ValueError(
                f"newer_experts: {self.newer_experts} is more than the "
                f"{len(self.round.participants)} participants of the round"
            )
        return self


def _comes(every: str) -> bool:
    """Whether it is a calendar whose time ever comes: the 31st of February does not."""
    from croniter import CroniterBadDateError, croniter  # here: no program starts later for it

    if not croniter.is_valid(every):
        return False
    try:
        croniter(every, 0).get_next(float)
    except CroniterBadDateError:
        return False
    return True


def parse_recurring(text: str) -> RecurringSpec:
    """Read the JSON of a recurring spec whose round's files are pinned as sha256:<digest>.

    Raises: SpecError.
    """
    try:
        spec = RecurringSpec.model_validate_json(text)
    except ValidationError as error:
        raise SpecError(first_message(error, RecurringSpec)) from error
    parse_spec(spec.round.model_dump_json())
    return spec


def load_recurring(path: Path) -> RecurringSpec:
    """Read a recurring spec from YAML.

    Raises: SpecError with file, line and cure.
    """
    try:
        root, values = read_yaml(path.read_bytes())
        return RecurringSpec.model_validate(values)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: is not YAML: {error}") from error
    except ValidationError as error:
        raise SpecError(with_lines(path, root, error, RecurringSpec)) from error
