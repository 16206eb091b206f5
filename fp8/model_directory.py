"""Write a model directory whole or not at all, a shard at a time.

It is made under another name, flushed to disk and renamed, so a kill at any moment leaves either
nothing of that name or everything.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fp8.block_layout import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, ExportError
from fp8.checkpoint_files import flush


class Saveable(Protocol):
    """What is written by its own method: a tokenizer."""

    def save_pretrained(self, save_directory: Path, /) -> object:
        """Write its files into a directory."""
        ...


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter or buffer of the model, turned into what is stored when its turn comes."""

    size_bytes: int
    make: Callable[[], dict[str, Tensor]]


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A directory beside `path` that takes its name when the block ends well, and else goes."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ExportError(f"{path} exists; give another name, or remove it first")
    draft = path.with_name(f"{path.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)  # left by a kill
    draft.mkdir(parents=True)
    try:
        yield draft
        flush([*draft.iterdir(), draft])
        draft.rename(path)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    flush([path.parent])


def write_shards(entries: Sequence[Entry], folder: Path, max_shard_bytes: int) -> int:
    """Write all tensors, and an index when there are several files; returns their bytes."""
    shards = _cut(entries, max_shard_bytes)
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: tensor for entry in shard for name, tensor in entry.make().items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
        del tensors  # before the next shard is made
    size = sum(entry.size_bytes for entry in entries)
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    return size


def _cut(entries: Iterable[Entry], max_shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    room = max_shard_bytes
    for entry in entries:
        if shards[-1] and entry.size_bytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= entry.size_bytes
    return shards


def write_config(
    model: nn.Module, folder: Path, dtype: torch.dtype, quantization: Mapping[str, Any] | None
) -> None:
    """Write config.json for the tensors as they are stored.

    Raises: ExportError when the model has no Hugging Face config.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "save_pretrained"):
        raise ExportError(
            f"{type(model).__name__} has no Hugging Face config, which loaders need; give the "
            "transformers model itself"
        )
    config.save_pretrained(folder)
    written = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    # A model that came from an FP8 checkpoint still carries that one's.
    written.pop("quantization_config", None)
    written |= {"architectures": [type(model).__name__], "dtype": str(dtype).partition(".")[2]}
    if quantization is not None:
        written["quantization_config"] = dict(quantization)
    text = json.dumps(written, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def write_companions(model: nn.Module, tokenizer: Saveable | None, folder: Path) -> None:
    """Write what goes beside the weights: generation settings and the tokenizer, where given."""
    generation: Any = getattr(model, "generation_config", None)
    for companion in (generation, tokenizer):
        if companion is not None:
            companion.save_pretrained(folder)
