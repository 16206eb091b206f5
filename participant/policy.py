"""policy.toml: the participant's own rules. What they do not allow does not leave."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from protos.config import read_toml
from protos.messages import Assignment


class PolicyRefusalError(Exception):
    """The policy does not allow this assignment; the message names the rule."""


class Policy(BaseModel):
    """What may leave. A missing or unreadable file allows nothing: the daemon does not start."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ship_logits: bool = False
    """Top-K log-probabilities of the expert on public prompts."""
    ship_weights: bool = False
    """Weights of a copy of the pivot trained here. Weights tell more than logits."""
    grow_experts: bool = False
    """Log-probabilities of a copy of the round's pivot that was trained on the private text."""
    ship_scores: bool = False
    """The expert's own scores (a few numbers) on a round's public evaluation set."""
    max_top_k: int = Field(default=16, ge=1, le=1024)
    max_positions_per_round: int = Field(default=200_000, ge=1)
    """Tokens of public text whose log-probabilities one round may ask for."""
    submitters: tuple[str, ...] = ()
    """Researchers whose rounds we join; empty: anybody the coordinator lets in."""


def load_policy(path: Path) -> Policy:
    """Read policy.toml.

    Raises: protos.config.ConfigError.
    """
    return read_toml(path, Policy)


def check(policy: Policy, assignment: Assignment) -> None:
    """Say no before any work is done.

    Raises: PolicyRefusalError.
    """
    spec = assignment.spec
    rules = (
        (
            spec.kind != "logits" or policy.ship_logits,
            "ship_logits is false: log-probabilities do not leave",
        ),
        (
            spec.grow is None or policy.grow_experts,
            "grow_experts is false: no received model is trained on the private text",
        ),
        (
            spec.kind != "weights" or policy.ship_weights,
            "ship_weights is false: weights do not leave",
        ),
        (
            spec.kind != "logits" or spec.top_k <= policy.max_top_k,
            f"top_k is {spec.top_k}, max_top_k allows {policy.max_top_k}",
        ),
        (
            not policy.submitters or assignment.submitted_by in policy.submitters,
            f"{assignment.submitted_by!r} is not among the submitters we trust",
        ),
    )
    for allowed, rule in rules:
        if not allowed:
            raise PolicyRefusalError(f"refused by policy.toml: {rule}")


def check_positions(policy: Policy, positions: int) -> None:
    """Say no to a release that holds more positions than one round may have.

    Raises: PolicyRefusalError.
    """
    if positions > policy.max_positions_per_round:
        raise PolicyRefusalError(
            f"refused by policy.toml: {positions} positions, "
            f"max_positions_per_round allows {policy.max_positions_per_round}"
        )
