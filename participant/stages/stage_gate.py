"""The canary gate between stages: what a stage made the expert recite of the planted records.

The gate at the door judges a release, late. This one tells which stage is to blame, and, where the
policy blocks, keeps the expert as the stage before left it.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from participant.canaries import open_canaries
from participant.canary_gate import RECALL, Verdict, verdict
from participant.canary_stats import Exposure, exposure
from participant.canary_student import log_likelihoods
from participant.policy import GateRules, load_policy
from participant.stages.cpt import open_expert
from protos.config import ConfigError

_LOG = logging.getLogger(__name__)
FIGURES: Final = "canaries"
"""Key of a stage's row in stages/evals.json: the fields of Exposure."""


@dataclass(frozen=True, slots=True)
class StageGate:
    """Where the planted records are kept, and the limits."""

    canaries: Path
    rules: GateRules

    @property
    def on(self) -> bool:
        """Whether there is anything to measure: the gate is on and records were planted."""
        return self.rules.canaries != "off" and self.canaries.exists()


def gate_of(policy: Path, canaries: Path | None) -> StageGate | None:
    """The gate that policy.toml asks for; None when no records are planted at all."""
    if canaries is None:
        return None
    try:
        rules = load_policy(policy).gates
    except ConfigError as error:  # nothing leaves by such a policy, and training need not wait
        _LOG.warning("the gate between stages only warns, with default limits: %s", error)
        rules = GateRules(canaries="warn")
    return StageGate(canaries, rules)


def recall_of(model: Path, canaries: Path) -> dict[str, float]:
    """How well the model itself tells planted records from those it never read.

    Raises: ValueError when there are no records, or a score is not finite.
    """
    records = open_canaries(canaries)
    if records is None:
        raise ValueError(f"{canaries}: found no canaries, wanted those of the first training")
    scores = log_likelihoods(*open_expert(model), [*records.planted, *records.held_out])
    cut = len(records.planted)
    return asdict(exposure(scores[:cut], scores[cut:]))


def judged(gate: StageGate, figures: Mapping[str, float], stage: str) -> Verdict:
    """Hold a stage's figures against the limits, and say it in the log."""
    found = verdict(gate.rules, {RECALL: Exposure(**figures)})  # type: ignore[arg-type]
    level = logging.INFO if found.passed else logging.WARNING
    _LOG.log(level, "canary gate after stage %s: %s", stage, found.words)
    return found
