"""Pairs of responses, and what a model thinks of them: four numbers a pair, as a file.

Shapes: N = pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from fusion.pair_file import PreferenceError, PreferencePair

_FORMAT: Final = "cofuse-pair-scores-1"
_BYTES_PER_PAIR: Final = 128
"""What four numbers may take in JSON, with room to spare."""
LEAST: Final = -100.0
"""Nats a token below which no answer is held: what a model is surer of tells nothing more."""
_DIGITS: Final = 2
"""Of a log-probability, after the point: a hundredth of a nat, and no room for anything else."""
_MORE_TOKENS: Final = 4
"""Tokens that an answer may have beside one for each of its bytes: its end, a space before it."""


@dataclass(frozen=True, slots=True, eq=False)
class PairScores:
    """What one model thinks of the responses of N pairs."""

    chosen_logp: NDArray[np.float64]
    """[N] log P(chosen and eos | prompt) in nats, at most 0."""
    chosen_tokens: NDArray[np.int64]
    """[N] the model's own tokens of chosen and eos."""
    rejected_logp: NDArray[np.float64]
    rejected_tokens: NDArray[np.int64]

    def of(self, which: Sequence[bool]) -> PairScores:
        """Scores of those pairs alone, in their order."""
        mask = np.asarray(which, bool)
        return PairScores(
            self.chosen_logp[mask],
            self.chosen_tokens[mask],
            self.rejected_logp[mask],
            self.rejected_tokens[mask],
        )


Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Logs = list[Annotated[float, Field(le=0)]]
Counts = list[Annotated[int, Field(ge=1, lt=2**31)]]


class _ScoresFile(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    format: Literal["cofuse-pair-scores-1"] = "cofuse-pair-scores-1"
    pairs_sha256: Sha256
    model_sha256: Sha256
    chosen_logp: Logs
    chosen_tokens: Counts
    rejected_logp: Logs
    rejected_tokens: Counts

    def scores(self) -> PairScores:
        return PairScores(
            np.asarray(self.chosen_logp, np.float64),
            np.asarray(self.chosen_tokens, np.int64),
            np.asarray(self.rejected_logp, np.float64),
            np.asarray(self.rejected_tokens, np.int64),
        )


def hash_pairs(pairs: Sequence[PreferencePair]) -> str:
    """Return the sha256 of the pairs in their order: scores are of these and no others."""
    lines = (json.dumps([pair.prompt, pair.chosen, pair.rejected]) for pair in pairs)
    return hashlib.sha256("".join(f"{line}\n" for line in lines).encode()).hexdigest()


def write_scores(
    path: Path, scores: PairScores, pairs: Sequence[PreferencePair], *, model_sha256: str
) -> None:
    """Write scores of the pairs, in hundredths of a nat; the same values give the same bytes.

    Raises: PreferenceError for what read_scores would refuse.
    """
    # + 0: of the two zeros there is one.
    chosen, rejected = (
        (np.round(logs, _DIGITS) + 0.0).tolist()
        for logs in (scores.chosen_logp, scores.rejected_logp)
    )
    try:
        file = _ScoresFile(
            pairs_sha256=hash_pairs(pairs),
            model_sha256=model_sha256,
            chosen_logp=chosen,
            chosen_tokens=scores.chosen_tokens.tolist(),
            rejected_logp=rejected,
            rejected_tokens=scores.rejected_tokens.tolist(),
        )
    except ValidationError as error:
        raise PreferenceError(f"{path} is not written: {_first(error)}") from error
    _check_each(path, file, pairs)
    path.write_text(file.model_dump_json(), encoding="utf-8")


def is_scores(path: Path) -> bool:
    """Whether a file says that it was written by write_scores."""
    with path.open("rb") as file:
        return _FORMAT.encode() in file.read(64)


def read_scores(path: Path, pairs: Sequence[PreferencePair]) -> PairScores:
    """Read the scores of these pairs, checked to the last number: each could be a model's.

    Raises: PreferenceError for a file that is too large, no such JSON, or of other pairs.
    """
    return _read(path, pairs).scores()


def rewrite_scores(
    draft: Path,
    out: Path,
    pairs: Sequence[PreferencePair],
    *,
    model_sha256: str,
    tokens: Sequence[tuple[int, int]],
) -> None:
    """Write a draft's values anew, if they are of these pairs and of this model.

    Args: tokens: of chosen and rejected, as the model's tokenizer cuts them.
    Raises: PreferenceError.
    """
    file = _read(draft, pairs)
    if file.model_sha256 != model_sha256:
        raise PreferenceError("the draft scores another model than was asked: make it again")
    if list(zip(file.chosen_tokens, file.rejected_tokens, strict=True)) != list(tokens):
        raise PreferenceError("the draft counts other tokens than its model reads: make it again")
    write_scores(out, file.scores(), pairs, model_sha256=model_sha256)


def _read(path: Path, pairs: Sequence[PreferencePair]) -> _ScoresFile:
    most, size = 1024 + _BYTES_PER_PAIR * len(pairs), path.stat().st_size
    if size > most:
        raise PreferenceError(
            f"{path} has {size} bytes; scores of {len(pairs)} pairs have at most {most}: is it of "
            "these pairs?"
        )
    try:
        file = _ScoresFile.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise PreferenceError(f"{path}: {_first(error)}; write it with write_scores") from error
    if file.pairs_sha256 != (wanted := hash_pairs(pairs)):
        raise PreferenceError(
            f"{path} scores the pairs {file.pairs_sha256[:12]}, wanted {wanted[:12]}: score the "
            "pairs of this round, in their order"
        )
    _check_each(path, file, pairs)
    return file


def _check_each(path: Path, file: _ScoresFile, pairs: Sequence[PreferencePair]) -> None:
    lists = (file.chosen_logp, file.chosen_tokens, file.rejected_logp, file.rejected_tokens)
    if {len(numbers) for numbers in lists} != {len(pairs)}:
        raise PreferenceError(
            f"{path}: found {[len(numbers) for numbers in lists]} numbers, wanted {len(pairs)} of "
            "each"
        )
    sides = (
        ("chosen", file.chosen_logp, file.chosen_tokens),
        ("rejected", file.rejected_logp, file.rejected_tokens),
    )
    for side, logs, tokens in sides:
        for place, (pair, log, count) in enumerate(zip(pairs, logs, tokens, strict=True)):
            most = len(getattr(pair, side).encode()) + _MORE_TOKENS
            if count > most or log < LEAST * count:
                raise PreferenceError(
                    f"{path}: {side} of pair {place}: found {log:g} nats for {count} tokens, "
                    f"wanted at most {most} tokens and at least {LEAST:g} nats for each"
                )


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{place}: {first['msg']}"
