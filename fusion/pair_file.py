"""Pairs of answers as a file, JSON lines: what can be used of it, and what is held out.

A line that cannot be used is counted and left out: people wrote these files, and one bad line in
ten thousand is no reason to stop. Everyone who reads the file with the same pivot finds the same.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerFast

from fusion.byte_tables import TokenizerError
from fusion.pair_scores import PreferenceError, PreferencePair
from fusion.pair_scoring import encoded
from protos.public_sets import Domain

ALL: Final = "pairs"
"""The domain of a pair that names none."""
_DOMAIN: Final[TypeAdapter[str]] = TypeAdapter(Domain)
_TEXTS: Final = ("prompt", "chosen", "rejected")


class _UnusableError(ValueError):
    """A line cannot be used; the message is the reason under which it is counted."""


@dataclass(frozen=True, slots=True)
class PairFile:
    """What a file of pairs holds."""

    pairs: list[PreferencePair]
    """In the order of the file."""
    domains: list[str]
    """Of each pair; ALL where the line names none."""
    skipped: dict[str, list[int]]
    """Numbers of the lines left out, by reason."""

    def held_out(self, share: float, seed: int) -> list[bool]:
        """Whether each pair is kept from training: all pairs of a prompt are, or none.

        Args: share: of the prompts, in [0, 1]; above 0, at least one is held out.
        Raises: PreferenceError when none would be left to train on.
        """

        def rank(prompt: str) -> bytes:
            return hashlib.sha256(f"{seed}\n{prompt}".encode()).digest()

        prompts = sorted({pair.prompt for pair in self.pairs}, key=rank)
        count = max(1, round(share * len(prompts))) if share else 0
        if count >= len(prompts):
            raise PreferenceError(
                f"found {len(self.pairs)} usable pairs of {len(prompts)} prompts, of which "
                f"held_out {share:g} leaves none to learn from; give more prompts, or held_out: 0"
            )
        held = set(prompts[:count])
        return [pair.prompt in held for pair in self.pairs]


def read_pairs(path: Path, tokenizer: PreTrainedTokenizerFast, context: int | None) -> PairFile:
    """Read the pairs that a pivot can learn from.

    Args: tokenizer, context: the pivot's; pairs longer than its context (tokens) are left out.
        None: it does not tell.
    Raises: PreferenceError when no line can be used.
    """
    found = PairFile([], [], defaultdict(list))
    seen: set[PreferencePair] = set()
    with path.open("rb") as file:  # what is no UTF-8 is a line like any other that cannot be used
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                pair, domain = _pair_of(line)
                if pair in seen:
                    raise _UnusableError("stands there twice")
                _require_readable(pair, tokenizer, context)
            except _UnusableError as error:
                found.skipped[str(error)].append(number)
                continue
            seen.add(pair)
            found.pairs.append(pair)
            found.domains.append(domain)
    if not found.pairs:
        why = "; ".join(f"line {n[0]}: {reason}" for reason, n in found.skipped.items())
        raise PreferenceError(
            f"{path}: found no usable pair ({why or 'it is empty'}), wanted lines of "
            '{"prompt": "...", "chosen": "...", "rejected": "..."}'
        )
    return found


def _pair_of(line: bytes) -> tuple[PreferencePair, str]:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise _UnusableError("no JSON") from None
    if not isinstance(value, dict) or not all(isinstance(value.get(k), str) for k in _TEXTS):
        raise _UnusableError("no prompt, chosen and rejected as texts")
    pair = PreferencePair(*(value[key] for key in _TEXTS))
    if not pair.chosen.strip() or not pair.rejected.strip():
        raise _UnusableError("an empty answer")
    if pair.chosen == pair.rejected:
        raise _UnusableError("two answers that are one")
    try:
        "".join((pair.prompt, pair.chosen, pair.rejected)).encode()
    except UnicodeEncodeError:
        raise _UnusableError("no Unicode text") from None
    try:
        domain = _DOMAIN.validate_python(value.get("domain") or ALL)
    except ValidationError:
        raise _UnusableError("a domain that is no name") from None
    return pair, domain


def _require_readable(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerFast, context: int | None
) -> None:
    try:
        rows, _ = encoded(tokenizer, [pair])
    except TokenizerError:
        if tokenizer.eos_token_id is None:
            raise
        raise _UnusableError("not given back by the pivot's tokenizer") from None
    if context is not None and max(map(len, rows[0])) - 1 > context:
        raise _UnusableError("longer than the pivot can see at once")


def counts(skipped: dict[str, list[int]]) -> dict[str, int]:
    """How many lines were left out, by reason, most first."""
    return {k: len(v) for k, v in sorted(skipped.items(), key=lambda item: -len(item[1]))}


def share_by_domain(
    right: Sequence[bool], domains: Sequence[str], measured: Sequence[bool]
) -> dict[str, float]:
    """Share of the measured pairs that are right, by domain."""
    rows: defaultdict[str, list[bool]] = defaultdict(list)
    for one, domain, counted in zip(right, domains, measured, strict=True):
        if counted:
            rows[domain].append(one)
    return {domain: sum(rows[domain]) / len(rows[domain]) for domain in sorted(rows)}
