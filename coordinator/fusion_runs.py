"""Which training runs a round spec asks for, and with what settings."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from fp8.train import TrainConfig
from fusion.objective import faithful_weight
from fusion.settings import FusionSettings
from protos.spec import RoundSpec


@dataclass(frozen=True, slots=True)
class Run:
    """One training run of a job."""

    name: str
    sources: tuple[str, ...]
    """Participants whose contributions it learns from; none for the control."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Fields of FusionSettings that are not the spec's."""


CONTROLS: Final[Mapping[str, Mapping[str, Any]]] = {
    "sft": {"loss": "none"},
    **{name: {"loss": name} for name in ("infifusion", "uld", "minced", "gold")},
    "uniform": {"routing": "uniform"},
    "dpo": {},
}
WITHOUT: Final = "without-"


def plan(spec: RoundSpec, sources: tuple[str, ...]) -> list[Run]:
    """The training runs a spec asks for, the pivot's own first."""
    runs = {
        "unified": [Run("unified", sources)],
        "pairwise": [Run(f"pairwise-{source}", (source,)) for source in sources],
        "merge": [],
        "preference": [Run("preference", sources)],
    }[spec.method]
    for control in spec.controls:
        if control == "leave_one_out":
            rest = {left: tuple(s for s in sources if s != left) for left in sources}
            runs += [Run(WITHOUT + left, others) for left, others in rest.items() if others]
        else:
            heard = () if control in ("sft", "dpo") else sources
            runs.append(Run(control, heard, CONTROLS[control]))
    return runs


def settings_of(
    spec: RoundSpec, changes: Mapping[str, Any] = MappingProxyType({})
) -> FusionSettings:
    """The spec's numbers as fusion wants them."""
    training = spec.training
    settings = FusionSettings(
        train=TrainConfig(**training.schedule(spec.seed)),
        batch_size=training.batch_size,
        seq_len=training.seq_len,
        apart=spec.apart,
        loss=spec.loss,
        routing=spec.routing,
        gate_nats=spec.gate_nats,
        distill_weight=spec.distill_weight,
        fp8=spec.precision == "fp8",
        max_share=spec.max_share,
        suspects=spec.suspects,
    )
    settings = replace(settings, **changes)
    # A published method keeps the share it was published with; see docs/papers.md.
    return replace(settings, distill_weight=faithful_weight(settings))
