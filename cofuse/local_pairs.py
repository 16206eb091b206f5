"""Method preference of a local fusion: the pairs of answers, and how each source reads them.

Loads tokenizers and files of scores, never weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from transformers import PreTrainedTokenizerFast

from cofuse.local_models import LocalInputError, Model
from cofuse.local_spec import LocalSpec
from fusion.byte_tables import TokenizerError
from fusion.pair_file import PairFile, PreferenceError, PreferencePair, counts, read_pairs
from fusion.pair_scores import PairScores, hash_pairs, read_scores
from fusion.pair_scoring import prefers_chosen
from fusion.pair_tokens import encoded, readable

_T = TypeVar("_T")
_LINES: Final = 3
"""Numbers of lines that are named for each reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsRead:
    """The pairs as one model reads them."""

    tokens: int | None
    """Of all rows, prompts among them; None of a file of scores, which tells answers only."""
    chosen: float
    """Mean tokens of the chosen answers, the end among them."""
    rejected: float
    longer: int | None
    """Pairs longer than its context, of whose prompt it sees the end alone."""
    agrees: float | None = None
    """Share of pairs of which it prefers the chosen answer; known of a file of scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsChecked:
    """A file of pairs that a pivot can learn from."""

    whole: PairFile
    """Every pair: what sources are asked about."""
    file: PairFile
    """Those that the pivot reads."""
    sha256: str
    """Of all pairs in their order: what scores are of."""
    held_out: int
    pivot: PairsRead

    @property
    def learned(self) -> int:
        """Pairs to learn from."""
        return len(self.file.pairs) - self.held_out

    def facts(self) -> dict[str, Any]:
        """What `--dry-run` tells, as JSON."""
        skipped = counts(self.file.skipped)
        return {
            "learned": self.learned,
            "held_out": self.held_out,
            "skipped": [
                {"reason": reason, "lines": n, "first": self.file.skipped[reason][:_LINES]}
                for reason, n in skipped.items()
            ],
            "pivot": asdict(self.pivot),
        }


def check_pairs(spec: LocalSpec, pivot: Model) -> PairsChecked:
    """Read the pairs as the pivot will.

    Raises: LocalInputError, PreferenceError.
    """
    assert spec.pairs is not None
    path, whole = spec.pairs, read_pairs(spec.pairs)
    file, _ = _on("pivot", pivot, lambda words: readable(path, words, pivot.context))
    held = file.held_out(spec.round.preference.held_out, spec.round.seed)
    return PairsChecked(
        whole=whole,
        file=file,
        sha256=hash_pairs(whole.pairs),
        held_out=sum(held),
        pivot=read_by("pivot", pivot, file.pairs),
    )


def read_by(key: str, model: Model, pairs: Sequence[PreferencePair]) -> PairsRead:
    """How a model's tokenizer cuts the pairs.

    Args: key: what the spec calls the model.
    Raises: LocalInputError when it does not give a text back, or has no eos.
    """
    rows, prompts = _on(key, model, lambda words: encoded(words, pairs))
    answers = [[len(ids) - start for ids in row] for row, start in zip(rows, prompts, strict=True)]
    longest = [max(map(len, row)) - 1 for row in rows]
    return PairsRead(
        tokens=sum(len(ids) for row in rows for ids in row),
        chosen=sum(row[0] for row in answers) / len(rows),
        rejected=sum(row[1] for row in answers) / len(rows),
        longer=0 if model.context is None else sum(n > model.context for n in longest),
    )


def read_file(key: str, path: Path, pairs: Sequence[PreferencePair]) -> PairsRead:
    """What a file of scores tells of the pairs. Raises: LocalInputError when it is of others."""
    try:
        scores: PairScores = read_scores(path, pairs)
    except PreferenceError as error:
        raise LocalInputError(f"{key}: {error}") from error
    right = prefers_chosen(scores, scores, "own")
    return PairsRead(
        tokens=None,
        chosen=float(scores.chosen_tokens.mean()),
        rejected=float(scores.rejected_tokens.mean()),
        longer=None,
        agrees=sum(right) / len(right),
    )


def _on(key: str, model: Model, use: Callable[[PreTrainedTokenizerFast], _T]) -> _T:
    """Use a model's tokenizer, and say whose it is when it fails."""
    try:
        words = PreTrainedTokenizerFast.from_pretrained(model.folder, local_files_only=True)
        return use(words)
    except PreferenceError:
        raise
    except (TokenizerError, OSError, ValueError) as error:
        raise LocalInputError(f"{key}: {model.folder}: {error}") from error
