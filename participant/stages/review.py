"""What the stages of a participant will read, and what they gave: for people, before and after.

Lines are checked as the stages check them, but for what only a tokenizer knows (too long, control
tokens, what the template refuses); those are counted once a stage has run.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from participant.config import ParticipantConfig, Stage
from participant.stages.conversations import (
    ChatError,
    Skipped,
    UnusableError,
    messages_of,
    question_of,
    read_lines,
)
from participant.stages.rewards import REWARDS

EVALS: Final = "evals.json"
PROGRESS: Final = "progress.jsonl"
"""A line for each step a stage did; after a crash some steps occur twice, and the last holds."""
_CHECKS: Final[Mapping[str, Callable[[Any], object]]] = {"sft": messages_of, "rl": question_of}


@dataclass(frozen=True, slots=True)
class Review:
    """One stage: its data, and how it went."""

    name: str
    data: Path
    usable: int
    """Lines."""
    skipped: Skipped
    problem: str
    """Why it cannot run; "" when nothing is known against it."""
    steps: int
    last: Mapping[str, float]
    """The newest line of its progress; empty before its first step."""


def review(config: ParticipantConfig) -> list[Review]:
    """Look at every stage after pre-training."""
    stages = config.data_dir / "expert" / "stages"
    return [
        _look(stage, f"{number}-{stage.kind}", stages)
        for number, stage in enumerate(config.stage, start=1)
    ]


def figures(config: ParticipantConfig) -> dict[str, dict[str, Any]]:
    """What was measured after each stage, by stage; empty before the first is finished."""
    path = config.data_dir / "expert" / "stages" / EVALS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _look(stage: Stage, name: str, stages: Path) -> Review:
    skipped, usable, problem = Skipped(), 0, ""
    try:
        for number, value in read_lines(stage.data):
            try:
                _CHECKS[stage.kind](value)
                usable += 1
            except UnusableError as error:
                skipped.add(error.reason, number)
    except (ChatError, OSError) as error:
        problem = str(error)
    if stage.kind == "rl" and (unknown := sorted(stage.rewards.keys() - REWARDS.keys())):
        problem = f"found the rewards {unknown}, wanted some of {sorted(REWARDS)}"
    if stage.template is not None and not stage.template.is_file():
        problem = f"{stage.template}: there is no such file; set `template` of the stage"
    if not problem and not usable:
        problem = f"{stage.data}: found no line to train on, wanted at least one"
    last = _last_line(stages / name / PROGRESS)
    return Review(name, stage.data, usable, skipped, problem, stage.steps, last)


def _last_line(path: Path) -> dict[str, float]:
    if not path.exists():
        return {}
    whole = path.read_text(encoding="utf-8").rpartition("\n")[0]  # the last one may be half written
    return dict(json.loads(whole.rpartition("\n")[2])) if whole else {}
