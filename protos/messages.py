"""The two small messages that the engine carries. They hold references, never bulk bytes."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from protos.spec import RoundSpec

RoundId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9-]{0,39}$")]
"""A participant names files after it, so it must never be a path."""
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class Message(BaseModel):
    """Frozen, strict on keys; JSON on the wire."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FileRef(Message):
    """One file of the artifact store."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    sha256: Sha256
    size_bytes: int = Field(ge=0)


class Assignment(Message):
    """What one participant is asked for in one round. The same attempt twice is the same work."""

    round_id: RoundId
    attempt: int = Field(ge=1)
    submitted_by: str
    spec: RoundSpec
    prompts: FileRef | None = None
    pairs: FileRef | None = None
    evals: FileRef | None = None
    pivot: tuple[FileRef, ...] = ()
    pivot_sha256: Sha256
    """Digest of the pivot's weights: what a delta is relative to."""
    deadline_unix_ms: int
    order: Annotated[str, StringConstraints(max_length=50_000)] = ""
    """The submitter's signed order for it (trust/orders.py)."""

    @property
    def public_set(self) -> FileRef | None:
        """The file that it asks about: prompts or pairs."""
        return self.pairs if self.spec.kind == "pairs" else self.prompts


class Scores(Message):
    """A model on the round's held-out sets."""

    bpb: dict[str, float] = {}
    """Bits per byte by domain; lower is better."""
    accuracy: dict[str, float] = {}
    """Share of multiple-choice questions answered right, by domain."""
    letter: dict[str, float] = {}
    """Of questions whose options stand under letters: by the likeliest letter."""
    written: dict[str, float] = {}
    """The same questions, by the letter that the model writes."""


class Report(Message):
    """What a participant says about its assignment."""

    round_id: RoundId
    attempt: int = Field(ge=1)
    status: Literal["committed", "refused", "failed", "waiting"]
    """waiting: for a person at the participant; another word, or the contribution, comes later."""
    detail: str = Field(default="", max_length=2000)
    """Why it was refused or failed, and what to do."""
    sha256: Sha256 | None = None
    size_bytes: int = 0
    scores: Scores = Scores()
    """The expert's own scores, measured at the participant."""
    parameters: int = 0
    architecture: str = ""
    vocabulary: int = 0
