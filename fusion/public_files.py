"""The public files that a round spec names: how each is read, and as what it is kept."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from fusion.pair_file import read_pairs
from protos.public_sets import read_evals, read_prompts

READERS: Final[Mapping[str, tuple[Callable[[Path], object], str]]] = {
    "prompts": (read_prompts, "PROMPTS"),
    "pairs": (read_pairs, "PROMPTS"),
    "evals": (read_evals, "EVALS"),
}
"""By key of the spec: reads the whole file, or raises PublicSetError; kind of artifact."""
