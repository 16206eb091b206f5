"""policy.toml: the participant's own rules. What no rule allows does not leave.

Two forms are read. The form of today has `version = 2`, `[[allow]]` rules and limits. The flat
form of before, a few switches, is taken for the one rule that it means.
"""

from collections.abc import Callable, Collection, Mapping
from datetime import date
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from protos.config import ConfigError, StrictConfig, checked, toml_values
from protos.messages import Assignment
from protos.spec import Digest, RoundSpec

ANY: Final = "*"
"""Stands for every purpose, every submitter that the coordinator lets in, every prompt set."""
Kind = Literal["logits", "grown", "pairs", "scores", "weights"]
"""logits: of the expert; grown: of a copy of the round's pivot that was trained on the private
text; pairs: how likely the expert finds each of two answers; scores: a few numbers on the
evaluation set; weights: how a trained copy of the pivot differs."""
Action = Literal["block", "warn", "off"]
_Any = Literal["*"]
_Word = Annotated[str, StringConstraints(pattern=r"^(\*|[a-z0-9][a-z0-9-]{0,63})$")]


class PolicyRefusalError(Exception):
    """The policy does not allow this; the message is told to the submitter, and names no secret."""

    def __init__(self, says: str, here: str = "") -> None:
        """Args: here: what only the institution's own log may tell."""
        super().__init__(f"refused by policy.toml: {says}")
        self.here = here


class Rule(StrictConfig):
    """[[allow]]: who may have what, for what. A key that is left out allows nothing."""

    purpose: _Word
    """As the round spec says it; "*": any."""
    submitters: tuple[_Word, ...] = ()
    """Researchers, as their certificates name them; "*": anybody the coordinator lets in."""
    kinds: tuple[Kind, ...] = ()
    prompt_sets: tuple[Digest | _Any, ...] = ()
    """Public texts and pairs that may be asked about, as sha256:<digest>; "*": any."""
    not_after: date | None = None
    """The last day on which the rule holds, UTC; None: it has none."""
    approval: Literal["auto", "manual"] = "manual"
    """manual: each finished release waits for `cofuse approve`."""


class LogitLimits(StrictConfig):
    """[logits]: how much may be told of an expert. None: without a limit.

    Of a pair of answers each token of both is a position: one number for a whole answer tells
    whether the expert has read it as well as a number for each of its tokens does.
    """

    k_max: int = Field(default=16, ge=1, le=1024)
    """Log-probabilities kept per position."""
    positions_per_round: int = Field(default=200_000, ge=1)
    """Tokens of public text whose log-probabilities one round may ask for."""
    positions_per_30d: int | None = Field(default=2_000_000, ge=1)
    """The same, over all rounds of the last thirty days."""
    releases_per_prompt: int | None = Field(default=4, ge=1)
    """Rounds that may ever ask about one prompt set."""


class WeightLimits(StrictConfig):
    """[weights]: off, whatever a rule says, until it is switched on."""

    enabled: bool = False


class PromptRules(StrictConfig):
    """[prompts]: what is done about a prompt set that looks private."""

    overlap: Action = "block"
    """It shares thirteen words in a row with the corpus."""
    phi: Action = "block"
    """It holds what looks like a person's data (participant/prompt_checks.py)."""


class GateRules(StrictConfig):
    """[gates]: what is done about a release that tells of the invented records in the training.

    A limit is passed when the lower end of the 95 % interval is above it; where the interval is too
    wide to tell, a warning is written.
    """

    canaries: Action = "off"
    auc_max: float = Field(default=0.62, ge=0.5, le=1)
    """What reads this release alone may tell a planted record from a held-out one so often: where
    the scores of both are normal, that is exactly as much as `tpr_max` lets it."""
    tpr_max: float = Field(default=0.03, ge=0, le=1)
    """It may find this share of the planted ones, at one false alarm in a hundred."""
    recall_tpr_max: float = Field(default=0.7, ge=0, le=1)
    """The same of the expert's own answer on the records themselves: what the text's own next
    token would tell if a prompt set quoted them, and past all other checks."""


class Policy(StrictConfig):
    """What may leave. Without a rule nothing does."""

    version: Literal[2] = 2
    allow: tuple[Rule, ...] = ()
    logits: LogitLimits = LogitLimits()
    weights: WeightLimits = WeightLimits()
    prompts: PromptRules = PromptRules()
    gates: GateRules = GateRules()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.weights.enabled and any("weights" in rule.kinds for rule in self.allow):
            raise ValueError("a rule allows weights, and [weights] enabled is false: change one")
        return self


class _FlatPolicy(StrictConfig):
    """The form of before: switches for all rounds and everybody."""

    ship_logits: bool = False
    ship_weights: bool = False
    grow_experts: bool = False
    ship_scores: bool = False
    max_top_k: int = Field(default=16, ge=1, le=1024)
    max_positions_per_round: int = Field(default=200_000, ge=1)
    submitters: tuple[str, ...] = ()
    """Empty: anybody the coordinator lets in."""

    def policy(self) -> Policy:
        """The same in rules; what it could not say is as unlimited as it was."""
        said: Mapping[Kind, bool] = {
            "logits": self.ship_logits,
            "grown": self.ship_logits and self.grow_experts,
            "scores": self.ship_scores,
            "weights": self.ship_weights,
        }
        rule = Rule(
            purpose=ANY,
            submitters=self.submitters or (ANY,),
            kinds=tuple(kind for kind, allowed in said.items() if allowed),
            prompt_sets=(ANY,),
            approval="auto",
        )
        return Policy(
            allow=(rule,),
            logits=LogitLimits(
                k_max=self.max_top_k,
                positions_per_round=self.max_positions_per_round,
                positions_per_30d=None,
                releases_per_prompt=None,
            ),
            weights=WeightLimits(enabled=self.ship_weights),
            prompts=PromptRules(overlap="off", phi="off"),
        )


def load_policy(path: Path) -> Policy:
    """Read policy.toml in either form.

    Raises: protos.config.ConfigError; whoever asks then lets nothing out.
    """
    values = toml_values(path)
    if not values.keys() & Policy.model_fields.keys():
        return checked(path, values, _FlatPolicy).policy()
    if "version" not in values:
        raise ConfigError(f"{path}: found rules of no version, wanted `version = 2` above them")
    return checked(path, values, Policy)


def kind_of(spec: RoundSpec) -> Kind:
    """What a round asks to leave, its report's scores aside."""
    return "grown" if spec.grow is not None else spec.kind


def match(policy: Policy, assignment: Assignment, today: date) -> Rule:
    """Find the one rule that allows an assignment, before any work is done.

    A refusal says what no rule allows, and never what other rules do allow.
    Args: today: in UTC.
    Raises: PolicyRefusalError.
    """
    spec, left, texts = assignment.spec, list(policy.allow), _prompt_sets(assignment)
    no_rule = f"no rule allows {kind_of(spec)}"
    steps: tuple[tuple[Callable[[Rule], bool], str], ...] = (
        (lambda rule: kind_of(spec) in rule.kinds, ""),
        (lambda rule: rule.purpose in (ANY, spec.purpose), f" for purpose {spec.purpose!r}"),
        (lambda rule: _among(assignment.submitted_by, rule.submitters), " to this submitter"),
        (
            lambda rule: all(_among(one, rule.prompt_sets) for one in texts),
            " on these prompts",
        ),
        (lambda rule: rule.not_after is None or today <= rule.not_after, f" after {today}"),
    )
    for kept, found in steps:
        no_rule += found
        left = [rule for rule in left if kept(rule)]
        if not left:
            raise PolicyRefusalError(no_rule)
    if len(left) > 1:
        raise PolicyRefusalError(
            f"{len(left)} rules allow it, wanted exactly one",
            f"rules {[policy.allow.index(rule) + 1 for rule in left]} overlap: make them disjoint",
        )
    _check_limits(policy, spec)
    return left[0]


def _prompt_sets(assignment: Assignment) -> set[str]:
    """The public sets that are named, and those that would be read, should they differ."""
    named = (assignment.spec.prompts, assignment.spec.pairs)
    read = (assignment.prompts, assignment.pairs)
    return {*filter(None, named), *(f"sha256:{one.sha256}" for one in read if one)}


def _among(name: str, allowed: Collection[str]) -> bool:
    return ANY in allowed or name in allowed


def _check_limits(policy: Policy, spec: RoundSpec) -> None:
    """Say no to what is asked in a way that no round may. Raises: PolicyRefusalError."""
    if spec.kind == "weights" and not policy.weights.enabled:
        raise PolicyRefusalError("weights are not enabled")
    if spec.kind == "logits" and spec.top_k > policy.logits.k_max:
        raise PolicyRefusalError(f"top_k is {spec.top_k}, k_max allows {policy.logits.k_max}")
