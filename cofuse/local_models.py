"""What lies at the paths of a local fusion: model directories and contribution files.

Reads configs and safetensors headers only: no weight is loaded, and torch is not imported.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from safetensors import SafetensorError, safe_open

from fusion.pair_scores import is_scores
from protos.chunks import sha256_of

Kind = Literal["model", "logits", "delta", "scores"]
_KINDS: Final[Mapping[str, Kind]] = {"LogitHeader": "logits", "DeltaHeader": "delta"}
"""Kind of a contribution file by what its metadata calls its format."""
_TOKENIZER: Final = "tokenizer.json"
_INDEX: Final = "model.safetensors.index.json"
_WEIGHTS: Final = "model.safetensors"
_CONFIGS: Final = (
    *("config.json", "generation_config.json", _TOKENIZER, "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("tokenizer.model", "chat_template.jinja"),
)


class LocalInputError(ValueError):
    """A folder or file of a local fusion cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A Hugging Face model directory, as its headers describe it."""

    folder: Path
    architecture: str
    vocabulary: int
    """Rows of the embedding; the tokenizer may use fewer."""
    context: int | None
    """Tokens the model can see at once, where its config tells."""
    shapes: Mapping[str, tuple[int, ...]]
    """Of every tensor in its files."""
    weights: tuple[Path, ...]
    quantized: str | None
    """The config's own word for how the weights are packed."""

    @property
    def parameters(self) -> int:
        """Numbers in its files; tied tensors count once."""
        total = 0
        for shape in self.shapes.values():
            size = 1
            for side in shape:
                size *= side
            total += size
        return total

    @property
    def files(self) -> dict[str, Path]:
        """What makes the model, by name: weights, configs and tokenizer; no cards, no logs."""
        configs = [self.folder / name for name in _CONFIGS]
        index = [self.folder / _INDEX] if len(self.weights) > 1 else []
        return {path.name: path for path in (*self.weights, *index, *configs) if path.is_file()}

    def digest(self) -> str:
        """Sha256 of its weights: of the file, or of the list of its shards' digests."""
        digests = [sha256_of(path) for path in self.weights]
        if len(digests) == 1:
            return digests[0]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_model(folder: Path) -> Model:
    """Describe a model directory.

    Raises: LocalInputError when it is none, or lacks what a fusion needs.
    """
    config = _config(folder)
    if not (folder / _TOKENIZER).is_file():
        raise LocalInputError(
            f"{folder}: found no {_TOKENIZER}, wanted the model's fast tokenizer beside it; "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
        )
    weights = _weights(folder)
    text: Mapping[str, Any] = config.get("text_config") or config
    names = config.get("architectures") or [config.get("model_type", "?")]
    vocabulary = text.get("vocab_size")
    if not isinstance(vocabulary, int):
        raise LocalInputError(
            f"{folder}: its config.json has no vocab_size, wanted a causal language model"
        )
    context = text.get("max_position_embeddings") or text.get("n_positions")
    return Model(
        folder=folder,
        architecture=str(names[0]),
        vocabulary=vocabulary,
        context=context if isinstance(context, int) else None,
        shapes=_shapes(weights),
        weights=weights,
        quantized=(config.get("quantization_config") or {}).get("quant_method"),
    )


def kind_of(path: Path) -> Kind:
    """Tell a model directory from a contribution file.

    Raises: LocalInputError for anything else.
    """
    if path.is_dir():
        return "model"
    if not path.is_file():
        raise LocalInputError(
            f"{path}: there is nothing, wanted a model directory or a contribution file; paths "
            "start at the spec's folder"
        )
    if is_scores(path):
        return "scores"
    try:
        with safe_open(path, framework="numpy") as file:
            named = (file.metadata() or {}).get("format", "")
    except (SafetensorError, OSError) as error:
        raise LocalInputError(
            f"{path}: is no safetensors file ({error}), wanted a model directory or a "
            "contribution file"
        ) from error
    if named not in _KINDS:
        raise LocalInputError(
            f"{path}: found safetensors of format {named!r}, wanted a contribution file (of "
            f"format {' or '.join(_KINDS)}); of a model, give the directory"
        )
    return _KINDS[named]


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise LocalInputError(
            f"{folder}: found no config.json, wanted a Hugging Face model directory"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LocalInputError(f"{path}: is not JSON ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise LocalInputError(f"{path}: holds no object; copy it again")
    return config


def _weights(folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights."""
    if (folder / _WEIGHTS).is_file():
        return (folder / _WEIGHTS,)
    if not (folder / _INDEX).is_file():
        raise LocalInputError(
            f"{folder}: found neither {_WEIGHTS} nor {_INDEX}; weights are read from safetensors "
            "only: save_pretrained(...) writes them"
        )
    try:
        names = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LocalInputError(f"{folder / _INDEX}: is no index; copy it again") from error
    shards = tuple(folder / name for name in sorted(set(names)))
    if missing := [path.name for path in shards if not path.is_file()]:
        raise LocalInputError(f"{folder}: {missing[0]} of its index is missing; copy it again")
    return shards


def _shapes(weights: tuple[Path, ...]) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weights:
        try:
            with safe_open(path, framework="numpy") as file:
                for name in file.keys():  # noqa: SIM118 - no mapping, though it has keys
                    shapes[name] = tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise LocalInputError(f"{path}: is no safetensors ({error}); copy it again") from error
    return shapes
