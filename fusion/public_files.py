"""The public files that a round spec names: how each is read, and as what it is kept."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from fusion.pair_file import PairFile, read_pairs
from protos.public_sets import read_evals, read_prompts
from protos.spec import RoundSpec

READERS: Final[Mapping[str, tuple[Callable[[Path], object], str]]] = {
    "prompts": (read_prompts, "PROMPTS"),
    "pairs": (read_pairs, "PROMPTS"),
    "evals": (read_evals, "EVALS"),
}
"""By key of the spec: reads the whole file, or raises PublicSetError; kind of artifact."""


def check_public(spec: RoundSpec, key: str, path: Path) -> str:
    """Read the file of one key as the round will; return the kind of artifact that it is.

    Raises: PublicSetError, also when the pairs that are held out leave none to learn from.
    """
    read, kind = READERS[key]
    found = read(path)
    if isinstance(found, PairFile):
        found.held_out(spec.preference.held_out, spec.seed)
    return kind
