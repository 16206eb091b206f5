"""The canary gate: no release leaves that tells of the invented records in the training.

What may be told is measured in a child process of the guard's, which is all that reads the model;
the guard itself decides, by the limits of policy.toml. Passing is evidence and no proof: an attack
that is better than this one would find more.
"""

import json
import logging
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from participant.canary_stats import Exposure
from participant.policy import GateRules, Kind, PolicyRefusalError

_LOG = logging.getLogger(__name__)
RELEASE: Final = "release"
"""Scored by what reads the release alone: a student distilled of it, or the very weights."""
RECALL: Final = "recall"
"""Scored by the expert itself: what its answer on the records would tell."""
_WORDS: Final = {
    RELEASE: "what reads the release alone",
    RECALL: "the expert's answer on the records themselves",
}
_REMEDY: Final = (
    "an expert that reads its text less often recites less of it: lower `steps` in [training] of "
    "participant.toml, or give it more text, move data/expert away and let it train anew"
)
_TOLD: Final = "the release did not pass this institution's canary gate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be measured."""

    kind: Kind
    release: Path
    """The file that would leave."""
    model: Path
    """Folder of the model it tells of; for weights, of the pivot it differs from."""
    canaries: Path
    """participant.canaries.FILE of this institution."""
    texts: Sequence[str] = ()
    """The prompt set; none for weights."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the limits say of a measurement."""

    passed: bool
    certain: bool
    """Whether every interval lies on one side of its limit."""
    words: str
    """The figures, for the institution's own log."""


def check(rules: GateRules, question: Question) -> dict[str, Exposure]:
    """Measure what a release tells, and let it pass or not; return what was measured.

    Nothing is measured where the gate is off.
    Raises: PolicyRefusalError when a limit is passed and the policy blocks, and when nothing can
        be measured because the model never read a canary.
    """
    if rules.canaries == "off":
        return {}
    if not question.canaries.exists():
        _refuse_or_warn(
            rules,
            "no canary is in the training: set `canaries = true` in "
            "participant.toml and train the expert anew, or switch the gate off",
        )
        return {}
    found = measure(question)
    said = verdict(rules, found)
    if not said.passed:
        _refuse_or_warn(rules, f"{said.words}; {_REMEDY}")
    elif not said.certain:
        _LOG.warning("canary gate: too few records to be sure: %s", said.words)
    else:
        _LOG.info("canary gate: %s", said.words)
    return found


def verdict(rules: GateRules, found: Mapping[str, Exposure]) -> Verdict:
    """Hold what was measured against the limits."""
    limits = (
        (RELEASE, "auc", rules.auc_max),
        (RELEASE, "tpr", rules.tpr_max),
        (RECALL, "tpr", rules.recall_tpr_max),
    )
    passed, certain, words = True, True, []
    for way, name, limit in limits:
        if way not in found:
            continue
        value, low, high = (getattr(found[way], f"{name}{end}") for end in ("", "_low", "_high"))
        passed &= low <= limit
        certain &= low > limit or high <= limit
        words.append(
            f"{_WORDS[way]}: {name} {value:.3f} ({low:.3f} to {high:.3f}), limit {limit:g}"
        )
    return Verdict(passed, certain, "; ".join(words))


def measure(question: Question) -> dict[str, Exposure]:
    """Let a child process measure it; its memory goes with it.

    Raises: RuntimeError when the child failed; nothing may leave then.
    """
    asked = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(question).items()}
    done = subprocess.run(
        [sys.executable, "-m", "participant.canary_student"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        _LOG.error("canary gate: %s", done.stderr[-4000:])
        raise RuntimeError(
            f"the canary gate could not measure the release (its process ended with "
            f"{done.returncode}); nothing leaves: the local log has what it said"
        )
    told: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return {way: Exposure(**values) for way, values in told.items()}


def _refuse_or_warn(rules: GateRules, words: str) -> None:
    if rules.canaries == "block":
        raise PolicyRefusalError(_TOLD, words)
    _LOG.warning("canary gate: %s", words)
