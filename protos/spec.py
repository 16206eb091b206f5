"""The round spec: what a researcher asks for, as strict data. Nothing in it is code."""

import json
from pathlib import Path
from typing import Annotated, Final, Literal, Self

import yaml
from pydantic import BaseModel, Field, StringConstraints, ValidationError, model_validator

from protos.faults import in_words, with_lines
from protos.spec_parts import PreferenceSpec
from protos.spec_parts import Strict as Strict  # the parts are found here too
from protos.spec_parts import TrainingSpec as TrainingSpec
from protos.yaml_text import read_yaml

LossName = Literal["span_kl", "infifusion", "infigfusion", "uld", "minced", "gold", "p_kl"]
RoutingName = Literal["posterior", "document", "static", "uniform"]
MergeName = Literal[
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "breadcrumbs",
    "sce",
    "model_stock",
    "slerp",
    "karcher",
    "wudi",
    "fisher",
    "iso_c",
    "tsv",
]
"""fusion.merge.MERGES; fisher is measured on the prompt set."""
OuterName = Literal["fedavg", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "diloco"]
OWN_LOSSES: Final = ("span_kl", "p_kl")
"""They take the spec's distill_weight; a published method keeps the one it was published with."""
ControlName = Literal[
    "sft", "infifusion", "uld", "minced", "gold", "uniform", "leave_one_out", "dpo"
]
METHODS: Final = {
    "logits": ("unified", "pairwise"),
    "weights": ("merge",),
    "pairs": ("preference",),
}
"""By kind."""
PUBLIC_SETS: Final = ("prompts", "pairs", "evals")
"""Keys of a spec that name a public file."""
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^sha256:[0-9a-f]{64}$")]
PivotName = Annotated[str, StringConstraints(pattern=r"^pivot-[0-9]{1,9}$")]
Purpose = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,63}$")]
_DISTILL_WEIGHT: Final = 0.7
_SEQ_LEN: Final = TrainingSpec.model_fields["seq_len"].default


class SpecError(ValueError):
    """A round spec that cannot be run; the message names the place and the cure."""


class RoundSpec(Strict):
    """One scheduled fusion. Files are paths in YAML and digests once submitted."""

    name: Name
    """A name for people; the round's id is the coordinator's."""
    pivot: PivotName
    """The pivot to start from."""
    purpose: Purpose = "general"
    """What the round is for: participants' policies allow purposes by name."""
    participants: tuple[Name, ...] = Field(min_length=1, max_length=1000, strict=False)
    """Who is asked, by name. There is no "all"."""
    kind: Literal["logits", "weights", "pairs"]
    """What each participant ships; pairs: how likely its expert finds each of two answers."""
    method: Literal["unified", "pairwise", "merge", "preference"]
    """unified: all sources in one run; pairwise: one run a source, then a merge; merge: weights;
    preference: which of two answers is the better one."""
    merge: MergeName = "task_arithmetic"
    """How copies or deltas become one (pairwise and merge)."""
    outer: OuterName | None = None
    """Merge rounds: step the pivot with this outer optimizer, whose state passes from pivot to
    pivot, instead of merging once."""
    prompts: str | None = None
    """Public prompt set, JSON lines of {"text": ...} (logits rounds)."""
    pairs: str | None = None
    """Public pairs of answers, JSON lines of {"prompt": ..., "chosen": ..., "rejected": ...} (pairs
    rounds)."""
    evals: str | None = None
    """Held-out documents and questions by domain, JSON."""
    top_k: int = Field(default=16, ge=1, le=1024)
    """Log-probabilities kept per position."""
    ship_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the positions whose log-probabilities are shipped: below 1, those at which the
    expert beats the pivot most."""
    sampler: Literal["top_k", "samples"] = "top_k"
    """samples: ids drawn from the expert's whole distribution, an unbiased target."""
    draws: int = Field(default=50, ge=1, le=255)
    """Draws per position (samples)."""
    loss: LossName = "span_kl"
    apart: bool = False
    """Of short prompts, such as questions: the pivot reads each on its own and whole, as the
    experts do. Else they follow one another, and windows of training.seq_len cut them anywhere."""
    routing: RoutingName = "posterior"
    max_share: float | None = Field(default=None, gt=0, le=1)
    """The most of the routing that one source may have; None: fusion's own default."""
    suspects: Literal["exclude", "report"] = "exclude"
    """What becomes of a source that teaches what the public text contradicts: left out of the
    pivot, or named only. With two sources nobody is one (unified rounds)."""
    gate_nats: float | None = Field(default=None, ge=0)
    """Silence a source that has read a text this much worse than the pivot; None: never."""
    precision: Literal["fp32", "fp8"] = "fp32"
    """Of the linear layers of the pivot while it is fused."""
    distill_weight: float = Field(default=_DISTILL_WEIGHT, ge=0, le=1)
    """lambda: share of the distillation loss; the rest is cross-entropy on the public text. Of
    OWN_LOSSES only."""
    merge_weight: float | None = Field(default=None, gt=0, le=10)
    """Factor on the merged delta; None: the method's own (fusion/merge.py)."""
    merge_density: float | None = Field(default=None, gt=0, le=1)
    """Share of a delta's entries kept, for merges that drop some; None: the method's own."""
    preference: PreferenceSpec = PreferenceSpec()
    """Of pairs rounds only."""
    training: TrainingSpec
    grow: TrainingSpec | None = None
    """Logits rounds: each participant first trains a copy of the pivot on its own text like this,
    and ships that copy's log-probabilities; None: those of the expert that it has."""
    rehearse: bool = False
    """Local training (grow, or a weights round) reads the prompt set beside the private text: the
    copies drift apart less, and forget less."""
    controls: tuple[ControlName, ...] = Field(default=(), strict=False)
    """Runs on the same text, steps and seed, reported beside the pivot. leave_one_out: one run
    without each source, which tells what the pivot owes it. dpo: of a pairs round; it hears no
    source."""
    quorum: int | None = Field(default=None, ge=1)
    """Contributions that are enough once collecting must end; default: every participant's."""
    deadline_minutes: float = Field(default=60, gt=0, le=60 * 24 * 30)
    """From submission until the round has ended, fusing included."""
    fusion_minutes: float | None = Field(default=None, ge=0)
    """The last part of the deadline, kept for fusing: from its beginning on nobody is waited for
    once there is a quorum. None: a third of the deadline."""
    seed: int = Field(default=0, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = (
            (
                len(set(self.participants)) != len(self.participants),
                "participants: a name stands twice; name each once",
            ),
            (
                self.method not in METHODS[self.kind],
                f"kind {self.kind!r} does not go with method {self.method!r}: "
                + ", ".join(f"{kind} takes {' or '.join(m)}" for kind, m in METHODS.items()),
            ),
            *self._pairs_faults(),
            (
                self.kind == "logits" and self.prompts is None,
                "prompts: a logits round needs a public prompt set; give its file",
            ),
            (
                self.method != "unified" and self.merge == "fisher" and self.prompts is None,
                "merge: fisher measures each source on a public prompt set; give its file",
            ),
            (
                self.apart and self.kind != "logits",
                f"apart: the pivot reads no prompts in a {self.kind} round; leave it out",
            ),
            (
                self.grow is not None and self.kind != "logits",
                f"grow: a {self.kind} round does not ask a grown copy; leave it out",
            ),
            (
                self.rehearse and (self.prompts is None or not self.trains_locally),
                "rehearse: wanted a prompt set and local training (grow, or kind weights); add "
                "them, or leave rehearse out",
            ),
            (
                self.outer is not None and self.method != "merge",
                f"outer: {self.outer!r} steps on the mean of deltas, and method {self.method!r} "
                "has none; leave it out, or take kind weights and method merge",
            ),
            (
                self.loss not in OWN_LOSSES and self.distill_weight != _DISTILL_WEIGHT,
                f"distill_weight: loss {self.loss!r} keeps the share that it was published with; "
                f"leave it out, or take loss {' or '.join(OWN_LOSSES)}",
            ),
            (
                "leave_one_out" in self.controls and self.method != "unified",
                "controls: leave_one_out goes with method unified only",
            ),
            (
                self.needed > len(self.participants),
                f"quorum: {self.quorum} is more than the {len(self.participants)} participants",
            ),
            (
                (self.fusion_minutes or 0) >= self.deadline_minutes,
                f"fusion_minutes: found {self.fusion_minutes}, wanted less than the "
                f"{self.deadline_minutes:g} of deadline_minutes: collecting needs time as well",
            ),
        )
        for wrong, words in faults:
            if wrong:
                raise ValueError(words)
        return self

    def _pairs_faults(self) -> tuple[tuple[bool, str], ...]:
        asks = self.kind == "pairs"
        others = [name for name in self.controls if (name == "dpo") != asks]
        return (
            (asks and self.pairs is None, "pairs: a pairs round needs public pairs; give its file"),
            (
                not asks and (self.pairs is not None or self.preference != PreferenceSpec()),
                f"pairs, preference: a {self.kind} round asks about no pairs; leave them out, or "
                "take kind pairs and method preference",
            ),
            (
                asks and self.prompts is not None,
                "prompts: a pairs round asks about its pairs alone; leave them out",
            ),
            (
                asks and self.training.seq_len != _SEQ_LEN,
                "training.seq_len: pairs are read whole; leave it out",
            ),
            (
                bool(others),
                f"controls: {', '.join(others)} and kind {self.kind!r} do not go together: dpo is "
                "of pairs rounds, and the only one there",
            ),
        )

    @property
    def public_set(self) -> str | None:
        """The public file that participants are asked about: prompts or pairs."""
        return self.pairs or self.prompts

    @property
    def trains_locally(self) -> bool:
        """Whether a participant trains a copy of the pivot for this round."""
        return self.kind == "weights" or self.grow is not None

    @property
    def needed(self) -> int:
        """Contributions without which nothing is fused."""
        return self.quorum or len(self.participants)


def parse_spec(text: str) -> RoundSpec:
    """Read the canonical JSON of a spec whose files are pinned as sha256:<digest>."""
    try:
        spec = RoundSpec.model_validate(json.loads(text))
    except (json.JSONDecodeError, ValidationError) as error:
        raise SpecError(first_message(error)) from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise SpecError(f"the spec cannot be read as JSON: {error}") from error
    for field in PUBLIC_SETS:
        value = getattr(spec, field)
        if value is not None and not _is_digest(value):
            raise SpecError(
                f"{field}: found {value!r}, wanted sha256:<64 hex digits>; "
                "the SDK uploads the file and pins it"
            )
    return spec


def load_spec(path: Path) -> RoundSpec:
    """Read a spec from YAML.

    Raises: SpecError with file, line and cure for unknown keys, wrong types and broken YAML.
    """
    try:
        root, values = read_yaml(path.read_bytes())
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except yaml.YAMLError as error:
        raise SpecError(f"{path}: is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SpecError(f"{path}: found no keys, wanted a round spec; see examples/")
    try:
        return RoundSpec.model_validate(values)
    except ValidationError as error:
        raise SpecError(with_lines(path, root, error, RoundSpec)) from error


def _is_digest(value: str) -> bool:
    head, _, digest = value.partition(":")
    return head == "sha256" and len(digest) == 64 and set(digest) <= set("0123456789abcdef")


def first_message(
    error: json.JSONDecodeError | ValidationError, top: type[BaseModel] = RoundSpec
) -> str:
    """Say in words what is wrong first: the place, what was found, and the cure.

    Args: top: the model that was read.
    """
    if isinstance(error, json.JSONDecodeError):
        return f"the spec is not JSON: {error}"
    return in_words(error.errors()[0], top)
