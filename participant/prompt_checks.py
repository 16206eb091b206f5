"""Does a public text look private? It shares a run of words with the corpus, or names a person.

Both are tripwires against prompts that quote a patient's record to have the expert finish it.
Passing them proves nothing: words may be changed, and a pattern knows its own form only.

The corpus is kept as one 64 bit fingerprint for each run of thirteen words, sorted, no two alike:
8 bytes a word of text, made once for each state of the file. A run that is not there is taken for
one with probability n / 2**64: below 1e-10 for 10**9 words of corpus, so below 1e-4 for a prompt
set of a million. (A Bloom filter as sure as that takes 5.4 bytes a word, and a rule that blocks on
one hit needs to be.) No run that is there is missed.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from participant.corpus import read_corpus
from protos.files import flush

RUN: Final = 13
"""Words in a row that two texts of different authors hardly share by chance."""
_BASE: Final = np.uint64(0x9E3779B97F4A7C15)
_WORD: Final = re.compile(r"\w+")


def fingerprints(text: str) -> NDArray[np.uint64]:
    """Return one number for each run of RUN words; case, spaces and punctuation do not count."""
    words = np.fromiter(map(_word, _WORD.findall(text.casefold())), np.uint64)
    runs = max(0, len(words) - RUN + 1)
    found = np.zeros(runs, np.uint64)
    for first in range(RUN):  # a polynomial modulo 2**64 whose coefficients are random: the words
        found = found * _BASE + words[first : first + runs]
    return found


@lru_cache(maxsize=1 << 18)
def _word(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")


def corpus_fingerprints(corpus: Path, folder: Path) -> NDArray[np.uint64]:
    """Read the corpus' runs, sorted, from `folder`; make them first where the corpus is newer.

    Memory: 16 bytes a word while they are made, none to speak of after.
    Raises: participant.corpus.CorpusError, OSError.
    """
    state = corpus.stat()
    path = folder / f"corpus-{state.st_size}-{state.st_mtime_ns}.npy"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        found = np.concatenate([fingerprints(text) for text in read_corpus(corpus)])
        partial = folder / "partial.npy"
        np.save(partial, np.unique(found))
        flush(partial)
        for old in folder.glob("corpus-*.npy"):
            old.unlink()
        partial.rename(path)
    known: NDArray[np.uint64] = np.load(path, mmap_mode="r", allow_pickle=False)
    return known


def overlapping(texts: Sequence[str], known: NDArray[np.uint64]) -> list[int]:
    """Return which texts, counted from 1, share a run of words with the corpus."""
    return [number for number, text in enumerate(texts, start=1) if _shares(text, known)]


def _shares(text: str, known: NDArray[np.uint64]) -> bool:
    runs = fingerprints(text)
    if not runs.size or not known.size:
        return False
    at = np.searchsorted(known, runs)
    return bool((known[np.minimum(at, known.size - 1)] == runs).any())


def _is_nhs_number(digits: str) -> bool:
    """Tell whether ten digits carry the check digit of an NHS number (modulo 11)."""
    if len(digits) != 10:
        return False
    total = sum(
        int(digit) * weight for digit, weight in zip(digits, range(10, 1, -1), strict=False)
    )
    return (11 - total % 11) % 11 == int(digits[9])


_DATE: Final = r"\d{1,4}[./ -]{1,2}(?:\d{1,2}|[a-z]{3,9})[./, -]{1,2}\d{2,4}"
PERSONAL: Final[Mapping[str, tuple[re.Pattern[str], Callable[[str], bool] | None]]] = {
    "date of birth": (
        re.compile(rf"\b(?:dob|d\.o\.b\.?|born(?: on)?|date of birth)\W{{0,3}}{_DATE}\b", re.I),
        None,
    ),
    "e-mail address": (
        re.compile(r"\b[\w.+-]{1,64}@(?:[a-z0-9-]{1,63}\.){1,4}[a-z]{2,24}\b", re.I),
        None,
    ),
    "telephone number": (
        re.compile(
            r"(?<![\w.+-])(?:\+\d{1,3}(?:[ .-]?\d){7,11}"
            r"|\(\d{3,5}\)[ .-]?\d{3,4}[ .-]?\d{3,4}|\d{3}[.-]\d{3}[.-]\d{4})(?![\w-])"
        ),
        None,
    ),
    "social security number": (
        re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"),
        None,
    ),
    "NHS number": (
        re.compile(r"(?<![\w.-])\d{3}[ -]\d{3}[ -]\d{4}(?![\w-])"),
        lambda found: _is_nhs_number(re.sub(r"\D", "", found)),
    ),
    "record number": (
        re.compile(
            r"\b(?:mrn|(?:medical record|patient|hospital|nhs) (?:id|no|number))\b"
            r"\W{0,4}(?:[a-z]{1,3}-?)?\d[\d -]{3,14}\d",
            re.I,
        ),
        None,
    ),
}
"""What a person's data look like, and what a find must fulfil besides."""


def personal(texts: Iterable[str]) -> dict[str, list[int]]:
    """Return which texts, counted from 1, hold something of PERSONAL, by its name."""
    found: dict[str, list[int]] = {}
    for number, text in enumerate(texts, start=1):
        for name, (pattern, holds) in PERSONAL.items():
            hits = (match.group() for match in pattern.finditer(text))
            if any(holds is None or holds(hit) for hit in hits):
                found.setdefault(name, []).append(number)
    return found
