"""What a demo run is to do, what it found, and what it claims."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from cofuse.demo.chat import Exchange
from cofuse.demo.settings import DemoSettings, Hospital

PIVOT_OF: Final = {"logits-unified": "unified", "logits-pairwise": "pairwise", "weights": "weights"}
Table = dict[str, dict[str, float]]


@dataclass(kw_only=True)
class DemoResult:
    """What a demo run found."""

    seconds: float = 0.0
    peak_rss_mb: float = 0.0
    bpb: Table = field(default_factory=dict)
    accuracy: Table = field(default_factory=dict)
    bytes_left: dict[str, int] = field(default_factory=dict)
    pivots: dict[str, str] = field(default_factory=dict)
    claims: list[tuple[str, bool]] = field(default_factory=list)
    curves: dict[str, list[float]] = field(default_factory=dict)
    participants: list[dict[str, Any]] = field(default_factory=list)
    credit: dict[str, Table] = field(default_factory=dict)
    """Of the unified round: who taught the pivot, and what is lost without whom."""
    chat: list[Exchange] = field(default_factory=list)
    """What a pivot said when it was asked about a fact of each hospital."""

    @property
    def ok(self) -> bool:
        """Whether every claim holds."""
        return all(held for _, held in self.claims)

    def as_json(self) -> dict[str, Any]:
        """The machine's answer."""
        keys = ("seconds", "peak_rss_mb", "bpb", "accuracy", "bytes_left", "pivots", "credit")
        chat = [asdict(one) for one in self.chat]
        return {"ok": self.ok, **{key: getattr(self, key) for key in keys}, "chat": chat}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoPlan:
    """What to run."""

    out: Path
    settings: DemoSettings
    hospitals: tuple[Hospital, ...]
    rounds: tuple[str, ...]
    seed: int
    source: Any = "packages"


def claims(bpb: Table) -> list[tuple[str, bool]]:
    """What the unified pivot must show, as sentences with their truth."""
    if "unified" not in bpb:
        return []
    unified = bpb["unified"]
    found = [
        (f"unified is better than base on {domain}", unified[domain] < bpb["base"][domain])
        for domain in unified
    ]
    rivals = [m for m in bpb if m in ("sft", "infifusion") or m.startswith("expert:")]
    return found + [
        (f"unified is better than {rival} on the mean", _mean(unified) < _mean(bpb[rival]))
        for rival in rivals
    ]


def ordered(table: Table, plan: DemoPlan) -> Table:
    """Base, the experts in their domains' order, the controls, the pivots; domains likewise."""
    experts = [f"expert:{hospital.name}" for hospital in plan.hospitals]
    models = ["base", *experts, "sft", "infifusion", *PIVOT_OF.values()]
    domains = [hospital.department for hospital in plan.hospitals]
    return {m: {d: table[m][d] for d in domains if d in table[m]} for m in models if m in table}


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
