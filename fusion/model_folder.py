"""Hugging Face model directories, a tensor at a time: plain or block-FP8, in one file or several.

Names and shapes are read off the files' headers; no architecture is known here. A tensor in
block-FP8 (E4M3 codes with scales beside them) is read as the float32 it stands for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fp8.block_layout import BLOCK, CONFIG_FILE, INDEX_FILE, SCALE_SUFFIX, SINGLE_FILE
from fp8.export import dequantize_checkpoint
from fusion.merge_settings import MergeError

FP8: Final = "F8_E4M3"
DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        FP8: torch.float8_e4m3fn,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""What can be read and written, by the name that files give it."""
HEADS: Final = ("lm_head.weight", "embed_out.weight")
"""Output heads, which a model may share with its embedding."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor on disk."""

    file: Path
    dtype: str
    """A key of DTYPES."""
    shape: tuple[int, ...]

    @property
    def floats(self) -> bool:
        """Whether it is merged; others are copied."""
        return DTYPES[self.dtype].is_floating_point


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """The tensors of a model directory, unread."""

    path: Path
    config: Mapping[str, Any]
    """config.json; empty for a single file."""
    tensors: Mapping[str, Stored]
    """By name, in the order of the files; scales of FP8 tensors are not among them."""
    scales: Mapping[str, Stored]
    """Of FP8 tensors, by the weight's name."""

    def read(self, name: str) -> Tensor:
        """Read one tensor; FP8 as float32, all others as they are.

        Raises: MergeError when the file is damaged, ExportError when FP8 values are.
        """
        tensor = _read(self.tensors[name].file, name)
        if name not in self.scales:
            return tensor
        scale = name.removesuffix(".weight") + SCALE_SUFFIX
        pair = {name: tensor, scale: _read(self.scales[name].file, scale)}
        return dict(dequantize_checkpoint(pair))[name]

    @property
    def ties_head(self) -> bool:
        """Whether the output head is the embedding."""
        text = self.config.get("text_config", {})
        return bool(self.config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))

    def vocabulary(self) -> dict[str, int] | None:
        """Return the ids of the tokenizer's tokens; None when there is no tokenizer.json."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            return None
        content = _json(file)
        vocab = content.get("model", {}).get("vocab", {})
        if not isinstance(vocab, dict):  # Unigram: [token, score] in order of id
            vocab = {entry[0]: place for place, entry in enumerate(vocab)}
        return vocab | {added["content"]: added["id"] for added in content.get("added_tokens", [])}


def open_model(path: Path) -> ModelFolder:
    """Look into a model directory; no tensor is read.

    Raises: MergeError when files are missing or damaged, or quantised in another way than FP8.
    """
    config = _json(path / CONFIG_FILE)
    quantization = config.get("quantization_config")
    if quantization is not None and (
        quantization.get("quant_method") != "fp8"
        or quantization.get("weight_block_size") != [BLOCK, BLOCK]
    ):
        raise MergeError(
            f"{path / CONFIG_FILE} says {quantization}; wanted no quantization, or 'fp8' in tiles "
            f"of {BLOCK} x {BLOCK}: save the model in bf16"
        )
    if not (path / INDEX_FILE).exists():
        return _folder(path, config, _tensors_of(path / SINGLE_FILE))
    where = _json(path / INDEX_FILE).get("weight_map", {})
    found: dict[str, Stored] = {}
    for file in sorted(set(where.values())):
        if Path(file).name != file:
            raise MergeError(f"{path / INDEX_FILE} names {file!r}, outside its directory")
        found |= _tensors_of(path / file)
    if odd := sorted(found.keys() ^ where.keys()):
        raise MergeError(f"{path / INDEX_FILE} and its files differ in {odd[:3]}; copy it again")
    return _folder(path, config, found)


def open_tensors(path: Path) -> ModelFolder:
    """Look into a model directory, or into one safetensors file without a config."""
    return open_model(path) if path.is_dir() else _folder(path, {}, _tensors_of(path))


def _folder(path: Path, config: Mapping[str, Any], found: dict[str, Stored]) -> ModelFolder:
    codes = {name for name, stored in found.items() if stored.dtype == FP8}
    scales = {name: name.removesuffix(".weight") + SCALE_SUFFIX for name in codes}
    if bare := sorted(name for name in codes if scales[name] not in found):
        raise MergeError(f"{bare[0]} of {path} is in E4M3 without {scales[bare[0]]}; copy it again")
    hidden = set(scales.values())
    return ModelFolder(
        path=path,
        config=config,
        tensors={name: stored for name, stored in found.items() if name not in hidden},
        scales={name: found[scale] for name, scale in scales.items()},
    )


def _tensors_of(file: Path) -> dict[str, Stored]:
    with _damage_in(file), safe_open(file, "pt") as handle:
        found = {}
        for name in handle.keys():  # noqa: SIM118
            place = handle.get_slice(name)
            found[name] = Stored(file, place.get_dtype(), tuple(place.get_shape()))
    if odd := sorted(name for name, stored in found.items() if stored.dtype not in DTYPES):
        raise MergeError(
            f"{odd[0]} of {file} is in {found[odd[0]].dtype}; wanted one of {', '.join(DTYPES)}"
        )
    return found


def _read(file: Path, name: str) -> Tensor:
    with _damage_in(file), safe_open(file, "pt") as handle:
        tensor: Tensor = handle.get_tensor(name)
        return tensor


def _json(file: Path) -> dict[str, Any]:
    with _damage_in(file):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise MergeError(f"{file} holds no JSON object; copy it again")
    return content


@contextmanager
def _damage_in(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise MergeError(f"{file}: no such file; give a Hugging Face model directory") from error
    except (SafetensorError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise MergeError(f"{file} is damaged ({error}); copy it again") from error


class SafetensorsFile:
    """Writes a safetensors file a tensor at a time, in any order; none but the one is held."""

    def __init__(self, path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        """Lay out the file. Args: layout: dtype (a key of DTYPES) and shape by name."""
        # Wide types first, so that each lies at a multiple of its own size.
        order = sorted(layout, key=lambda name: (-DTYPES[layout[name][0]].itemsize, name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._layout, self._at, end = layout, dict[str, int](), 0
        for name in order:
            dtype, shape = layout[name]
            self._at[name] = end
            end += math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {
                "dtype": dtype,
                "shape": shape,
                "data_offsets": [self._at[name], end],
            }
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        self._start = 8 + len(raw)
        self._file = path.open("wb")
        self._file.write(len(raw).to_bytes(8, "little") + raw)
        self._file.truncate(self._start + end)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, which must have the dtype and shape it was announced with."""
        dtype, shape = self._layout[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (DTYPES[dtype], shape)
        self._file.seek(self._start + self._at[name])
        tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tofile(self._file)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()
