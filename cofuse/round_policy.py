"""Which policies would refuse a round, as far as they are known here: before it is submitted."""

from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Final

from cofuse.round_cost import Cost
from participant import budget
from participant.policy import LogitLimits, Policy, PolicyRefusalError, kind_of, load_policy, match
from protos.messages import Assignment
from protos.spec import RoundSpec

_NOBODY: Final = "0" * 64


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one policy says."""

    policy: str
    allowed: bool
    says: str
    """The rule that allows it and who decides, or what refuses it."""


def judge(path: Path, spec: RoundSpec, cost: Cost | None, submitter: str) -> Verdict:
    """Ask a policy.toml, with nothing of its budget spent. Raises: protos.config.ConfigError."""
    policy = load_policy(path)
    try:
        rule = match(policy, _assignment(spec, submitter), datetime.now(UTC).date())
        _within(policy.logits, spec, cost)
    except PolicyRefusalError as refusal:
        return Verdict(str(path), False, str(refusal).removeprefix("refused by policy.toml: "))
    number = policy.allow.index(rule) + 1
    return Verdict(str(path), True, f"rule {number} ({rule.purpose}), approval {rule.approval}")


def beyond_the_usual(spec: RoundSpec, cost: Cost | None) -> str:
    """What the limits of a policy that nobody has changed would refuse; "" when nothing."""
    usual = Policy().logits
    if spec.kind == "logits" and spec.top_k > usual.k_max:
        return f"top_k is {spec.top_k}, k_max allows {usual.k_max}"
    try:
        _within(usual, spec, cost)
    except PolicyRefusalError as refusal:
        return str(refusal).removeprefix("refused by policy.toml: ")
    return ""


def _within(limits: LogitLimits, spec: RoundSpec, cost: Cost | None) -> None:
    """Hold the most it may cost against the limits. Raises: PolicyRefusalError."""
    if cost is None:
        return
    question = budget.Question(
        round_id="", kind=kind_of(spec), model="", positions=cost.positions[1]
    )
    budget.check([], question, limits, _unix_ms(date.today()))


def _unix_ms(day: date) -> int:
    return int(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp() * 1000)


def _assignment(spec: RoundSpec, submitter: str) -> Assignment:
    """The work as a participant would see it."""
    return Assignment(
        round_id="rnd-0",
        attempt=1,
        submitted_by=submitter,
        spec=spec,
        pivot_sha256=_NOBODY,
        deadline_unix_ms=0,
    )
