"""The ledger of what was ever asked of this institution's models: what is spent stays spent.

`budget.jsonl`, one line an entry, appended and synced before any work is done. A reservation counts
from that moment on, whatever becomes of its round: a crash counts too much, never too little. The
coordinator's receipt is written beside it and changes no count. A line without its end was cut off
by a crash before its work began, and does not count; any other line that cannot be read means that
somebody changed the file, and then nothing is allowed.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from participant.policy import Kind, LogitLimits, PolicyRefusalError
from protos.files import flush

FILE: Final = "budget.jsonl"
_DAY_MS: Final = 24 * 3600 * 1000
WINDOW_DAYS: Final = 30
WINDOW_MS: Final = WINDOW_DAYS * _DAY_MS


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Question(_Line):
    """What a round wants to know of one model."""

    round_id: str
    kind: Kind
    model: str
    """The model that is asked: the digest of its weights, or of how it is to be trained."""
    prompt_set: str = ""
    """Digest of the public text; "" for weights."""
    form: str = ""
    """How the answer is cut: sampler, K, draws. Two forms of one answer tell more than one."""
    positions: int = Field(default=0, ge=0)
    """Tokens of public text in the model's own tokenizer; 0 for weights."""


class Reserved(_Line):
    """A question that was let through."""

    act: Literal["reserve"] = "reserve"
    unix_ms: int
    question: Question


class Receipted(_Line):
    """The coordinator's word that it has the answer."""

    act: Literal["receipt"] = "receipt"
    unix_ms: int
    round_id: str
    sha256: str


Entry = Reserved | Receipted
_ENTRY: Final[TypeAdapter[Entry]] = TypeAdapter(Entry)


def used(entries: Sequence[Entry], now_unix_ms: int) -> int:
    """Count the positions of the last thirty days; what a clock put into the future counts too."""
    return sum(
        entry.question.positions
        for entry in entries
        if isinstance(entry, Reserved) and entry.unix_ms > now_unix_ms - WINDOW_MS
    )


@dataclass(frozen=True, slots=True)
class Standing:
    """How the budget stands at one moment."""

    at_unix_ms: int
    asked: int
    """Positions that were asked for in the day before."""
    used: int
    """Positions of the thirty days before."""


def burn_down(entries: Sequence[Entry], now_unix_ms: int) -> list[Standing]:
    """How the budget was spent in thirty days, and how it comes back if nothing more is asked.

    One row a day, from thirty days ago to thirty days ahead; days on which nothing changes are left
    out, but for the first, this moment and the last.
    """
    spent = [
        (min(entry.unix_ms, now_unix_ms), entry.question.positions)
        for entry in entries
        if isinstance(entry, Reserved)
    ]

    def within(at: int, span_ms: int) -> int:
        return sum(positions for asked, positions in spent if at - span_ms < asked <= at)

    days = range(-WINDOW_DAYS, WINDOW_DAYS + 1)
    moments = [now_unix_ms + day * _DAY_MS for day in days]
    rows = [Standing(at, within(at, _DAY_MS), within(at, WINDOW_MS)) for at in moments]
    marks = (rows[0].at_unix_ms, now_unix_ms, rows[-1].at_unix_ms)
    return [
        row
        for before, row in zip([rows[0], *rows], rows, strict=False)
        if row.at_unix_ms in marks or row.asked or row.used != before.used
    ]


def check(
    entries: Sequence[Entry], question: Question, limits: LogitLimits, now_unix_ms: int
) -> None:
    """Say no to a question that costs more than is left. Raises: PolicyRefusalError."""
    if question.kind == "weights":
        return
    asked, most = question.positions, limits.positions_per_round
    if asked > most:
        raise PolicyRefusalError(f"{asked} positions, positions_per_round allows {most}")
    before, most_30d = used(entries, now_unix_ms), limits.positions_per_30d
    if most_30d is not None and before + asked > most_30d:
        raise PolicyRefusalError(
            f"{asked} positions, and less than that is left of positions_per_30d",
            f"{before} positions are used, {asked} more were asked for, {most_30d} are allowed",
        )
    same = [
        entry.question
        for entry in entries
        if isinstance(entry, Reserved) and entry.question.prompt_set == question.prompt_set
    ]
    if limits.releases_per_prompt is not None and len(same) >= limits.releases_per_prompt:
        raise PolicyRefusalError(
            f"this prompt set was asked about {len(same)} times, releases_per_prompt allows "
            f"{limits.releases_per_prompt}"
        )
    if any(old.model == question.model and old.form != question.form for old in same):
        raise PolicyRefusalError(
            "this model has answered on this prompt set in another form (top_k, sampler, draws, "
            "seed), and two forms tell more than one: ask as before, or about other text"
        )


class Ledger:
    """budget.jsonl. Read anew at every look, so that no two views of it can differ."""

    def __init__(
        self, path: Path, clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    ) -> None:
        """Args: clock: unix ms."""
        self._path = path
        self._clock = clock

    def entries(self) -> list[Entry]:
        """Everything that was ever written.

        Raises: PolicyRefusalError when the file was changed by somebody else.
        """
        if not self._path.exists():
            return []
        lines = self._path.read_bytes().split(b"\n")[:-1]  # what follows the last end is torn
        try:
            return [_ENTRY.validate_json(line) for line in lines]
        except ValidationError as error:
            raise PolicyRefusalError(
                "the budget cannot be read",
                f"{self._path}: found a line that is none of ours, wanted reservations and "
                f"receipts: restore the file from a backup that is not older ({error})",
            ) from error

    def used(self) -> int:
        """Count the positions of the last thirty days."""
        return used(self.entries(), self._clock())

    def burn_down(self) -> list[Standing]:
        """How it was spent, and comes back. Raises: PolicyRefusalError as entries."""
        return burn_down(self.entries(), self._clock())

    def question(self, round_id: str) -> Question | None:
        """What a round has asked last. Raises: PolicyRefusalError as entries."""
        asked = (entry.question for entry in self.entries() if isinstance(entry, Reserved))
        return next((one for one in reversed(list(asked)) if one.round_id == round_id), None)

    def reserve(self, question: Question, limits: LogitLimits) -> None:
        """Take the question's cost out of the budget, for good; asked again, it costs no more.

        Raises: PolicyRefusalError when less is left, OSError.
        """
        entries = self.entries()
        known = [entry.question for entry in entries if isinstance(entry, Reserved)]
        if question in known:
            flush(self._path)  # a killed process may have left it in the system's memory alone
            return
        now = self._clock()
        check(entries, question, limits, now)
        self._append(Reserved(unix_ms=now, question=question))

    def receipt(self, round_id: str, sha256: str) -> None:
        """Write the coordinator's receipt down, once. Raises: OSError."""
        entries = self.entries()
        seen = {(e.round_id, e.sha256) for e in entries if isinstance(e, Receipted)}
        if (round_id, sha256) not in seen:
            self._append(Receipted(unix_ms=self._clock(), round_id=round_id, sha256=sha256))

    def _append(self, entry: Entry) -> None:
        fresh = not self._path.exists()
        with self._path.open("ab") as file:
            if (size := file.tell()) > 0:
                raw = self._path.read_bytes()
                if (whole := raw.rfind(b"\n") + 1) < size:
                    file.truncate(whole)
            file.write(entry.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            flush(self._path.parent)
