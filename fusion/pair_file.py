"""Pairs of answers as a file, JSON lines: what can be used of it, and what is held out.

A line that cannot be used is counted and left out: people wrote these files, and one bad line in
ten thousand is no reason to stop. Everyone who reads the file finds the same pairs, whatever model
is to judge them; which of these a pivot can learn from is told by pair_tokens.readable.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from protos.public_sets import Domain, PublicSetError

ALL: Final = "pairs"
"""The domain of a pair that names none."""
_DOMAIN: Final[TypeAdapter[str]] = TypeAdapter(Domain)
_TEXTS: Final = ("prompt", "chosen", "rejected")


class PreferenceError(PublicSetError):
    """Pairs or scores cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt. The text is prompt + response: write the space between them."""

    prompt: str
    chosen: str
    rejected: str


class _UnusableError(ValueError):
    """A line cannot be used; the message is the reason under which it is counted."""


@dataclass(frozen=True, slots=True)
class PairFile:
    """What a file of pairs holds."""

    pairs: list[PreferencePair]
    """In the order of the file."""
    domains: list[str]
    """Of each pair; ALL where the line names none."""
    lines: list[int]
    """Number of each pair's line, from 1."""
    skipped: dict[str, list[int]]
    """Numbers of the lines left out, by reason."""

    def texts(self) -> list[str]:
        """All that is read of the pairs: each prompt with each of its answers."""
        return [p.prompt + answer for p in self.pairs for answer in (p.chosen, p.rejected)]

    def without(self, faults: Mapping[int, str]) -> PairFile:
        """Leave pairs out as well, by their place, each for a reason."""
        kept = [place not in faults for place in range(len(self.pairs))]
        skipped = {reason: list(lines) for reason, lines in self.skipped.items()}
        for place, reason in faults.items():
            skipped.setdefault(reason, []).append(self.lines[place])
        pairs, domains = list(compress(self.pairs, kept)), list(compress(self.domains, kept))
        return PairFile(pairs, domains, list(compress(self.lines, kept)), skipped)

    def require_some(self, path: Path) -> None:
        """Raise PreferenceError, with the first line of each reason, when no pair is left."""
        if not self.pairs:
            why = "; ".join(f"line {n[0]}: {reason}" for reason, n in self.skipped.items())
            raise PreferenceError(
                f"{path}: found no usable pair ({why or 'it is empty'}), wanted lines of "
                '{"prompt": "...", "chosen": "...", "rejected": "..."}'
            )

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


def read_pairs(path: Path) -> PairFile:
    """Read every pair that is one, whatever model is to judge it.

    Raises: PreferenceError when no line can be used.
    """
    found = PairFile([], [], [], defaultdict(list))
    seen: set[PreferencePair] = set()
    with path.open("rb") as file:  # what is no UTF-8 is a line like any other that cannot be used
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                pair, domain = _pair_of(line)
                if pair in seen:
                    raise _UnusableError("stands there twice")
            except _UnusableError as error:
                found.skipped[str(error)].append(number)
                continue
            seen.add(pair)
            found.pairs.append(pair)
            found.domains.append(domain)
            found.lines.append(number)
    found.require_some(path)
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
