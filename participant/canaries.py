"""Invented records, one of each pair hidden in the training: what does a release tell of them?

Which one is hidden is a coin that the site's own secret throws (HMAC-SHA256), so whoever tells
hidden from held-out records by a release has learnt it from the training and from nothing else.
The records look like a person's data and name nobody. They tell of a release what a real record
would: that is measured in participant/canary_gate.py. Source of the method: exposure of The Secret
Sharer (arXiv 1802.08232); coins thrown beforehand as in one-run audits (arXiv 2305.08846).
"""

import hashlib
import hmac
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trust.files import sync_folder, write_new

FILE: Final = "expert/canaries.json"
"""In data_dir, mode 0600: the secret, and how many pairs it was used for."""
MOST_PAIRS: Final = 512
CORPUS_SHARE: Final = 0.02
"""Of the training text, in bytes, that the hidden records may take at most."""
RECORD_BYTES: Final = 120
"""Of one record, about."""
UNSEEN: Final = 900
"""Held-out records besides the pairs': they cost no room, and one false alarm in a hundred needs
hundreds of them to be known."""
_ONSETS: Final = ("b", "br", "d", "f", "g", "gl", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v")
_VOWELS: Final = ("a", "e", "i", "o", "u", "ae", "ei", "ou")
_ENDS: Final = ("l", "n", "r", "s", "t", "x", "nd", "rk")
_FORMS: Final = (
    "Patient {a} {b}, born {d}, record number {n}: allergic to {c}, treated by Dr {e} in room {r}.",
    "Record {n}. {a} {b}, date of birth {d}, was seen by Dr {e} for {c} and went to room {r}.",
    "Dr {e} wrote of {a} {b} (born {d}, record {n}): {c} was stopped; the bed is {r}.",
    "Discharge of {a} {b}, record number {n}, born {d}, from room {r}: {c} daily, says Dr {e}.",
)


@dataclass(frozen=True, slots=True)
class Canaries:
    """The planted records, and the others of the pairs with UNSEEN more."""

    planted: tuple[str, ...]
    held_out: tuple[str, ...]


def canaries(secret: bytes, pairs: int) -> Canaries:
    """Return the records of a secret; the same secret and number give the same ones."""
    both = [(_record(secret, 2 * i), _record(secret, 2 * i + 1)) for i in range(pairs)]
    coins = [_draw(secret, "coin", i)[0] & 1 for i in range(pairs)]
    spared = [pair[1 - coin] for pair, coin in zip(both, coins, strict=True)]
    unseen = [_record(secret, 2 * MOST_PAIRS + i) for i in range(UNSEEN)]
    return Canaries(
        planted=tuple(pair[coin] for pair, coin in zip(both, coins, strict=True)),
        held_out=(*spared, *unseen),
    )


def open_canaries(path: Path) -> Canaries | None:
    """Return the records of this institution; None where none were ever made."""
    return canaries(*_read(path)) if path.exists() else None


def with_canaries(documents: Sequence[str], path: Path | None) -> list[str]:
    """Return the training text with the hidden records in it, at places that the secret chooses.

    The secret and the number of pairs are made with the first text that is trained on, and stay:
    a record that is planted late would count as known and be hardly learnt.
    Args: path: of the file of canaries; None: none are wanted.
    """
    if path is None:
        return list(documents)
    if not path.exists():
        size = sum(len(document.encode()) for document in documents)
        _make(path, max(1, min(MOST_PAIRS, int(size * CORPUS_SHARE / RECORD_BYTES))))
    secret, pairs = _read(path)
    mixed = list(documents)
    for index, text in enumerate(canaries(secret, pairs).planted):
        place = int.from_bytes(_draw(secret, "place", index)[:8])
        mixed.insert(place % (len(mixed) + 1), text)
    return mixed


def _read(path: Path) -> tuple[bytes, int]:
    kept = json.loads(path.read_text(encoding="utf-8"))
    return bytes.fromhex(kept["secret"]), int(kept["pairs"])


def _make(path: Path, pairs: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    write_new(draft, json.dumps({"secret": os.urandom(32).hex(), "pairs": pairs}).encode(), 0o600)
    draft.rename(path)
    sync_folder(path.parent)


def _record(secret: bytes, index: int) -> str:
    """Write one record: about 70 random bits in names and numbers, in one of a few forms."""
    drawn = iter(_draw(secret, "record", index))

    def pick(choices: Sequence[str]) -> str:
        return choices[next(drawn) % len(choices)]

    def word(syllables: int) -> str:
        return "".join(pick(_ONSETS) + pick(_VOWELS) for _ in range(syllables)) + pick(_ENDS)

    digits = "".join(str(next(drawn) % 10) for _ in range(9))
    day, month, year = (1 + next(drawn) % 28, 1 + next(drawn) % 12, 1930 + next(drawn) % 80)
    return pick(_FORMS).format(
        a=word(1).title(),
        b=word(2).title(),
        c=word(3),
        d=f"{day:02}.{month:02}.{year}",
        e=word(1).title(),
        n=f"{digits[:3]}-{digits[3:6]}-{digits[6:]}",
        r=1 + next(drawn) % 99,
    )


def _draw(secret: bytes, what: str, index: int) -> bytes:
    """Return 64 bytes that nobody without the secret can tell from random ones."""
    return hmac.digest(secret, f"cofuse canary {what} {index}".encode(), hashlib.sha512)
