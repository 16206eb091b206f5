"""Read a checkpoint in the Hugging Face block-FP8 layout, ours or another's, tensor by tensor.

Strict: whatever is missing, of another shape, of another method or damaged is an ExportError that
says what to do; a wrong weight is never made up for. Shapes: N, K = rows, columns of a weight;
R, C = rows, columns of a tile; n, k = tiles along them, the last one maybe short.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fp8.formats import E4M3
from fp8.quantize import Quantized, dequantize
from fp8.recipe import QuantSpec

BLOCK: Final = 128
CONFIG_FILE: Final = "config.json"
SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
SCALE_SUFFIX: Final = ".weight_scale_inv"
STATIC_SUFFIXES: Final = (".activation_scale", ".input_scale")
_E4M3_NAMES: Final = ("F8_E4M3", str(E4M3.dtype))
_SCALE_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu)
_SCALE_NAMES: Final = ("F32", "BF16", "F16", "F8_E8M0", *map(str, _SCALE_DTYPES))
_NAN_CODE: Final = 0x7F
_COPY_AGAIN: Final = "copy the checkpoint again, or export it anew"


class ExportError(ValueError):
    """A checkpoint cannot be written or read; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor that is not yet read."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def is_fp8_checkpoint(path: Path | str) -> bool:
    """Tell whether a model directory says that its weights are block-FP8.

    Raises: ExportError when there is no config.json, or none that can be read.
    """
    quantization = _read_json(Path(path) / CONFIG_FILE).get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("quant_method") == "fp8"


def load_fp8(path: Path | str) -> dict[str, Tensor]:
    """Read a whole block-FP8 directory: tensors by name, FP8 weights dequantised to float32.

    Exact for power-of-two scales; others are rounded to float32 once. Tensors that are not FP8
    keep their dtype. For large models take `dequantize_checkpoint` or `load_fp8_into`.
    """
    return dict(dequantize_checkpoint(path))


def load_fp8_into(model: nn.Module, path: Path | str) -> None:
    """Load a block-FP8 directory into the parameters and buffers of a model, in their dtype.

    Raises: ExportError when a tensor is missing, unknown or of another shape, and then the model
        is as it was; or when values are damaged, or differ where the model has one tensor.
    """
    stored, block = _open(Path(path))
    _check_layout(stored, block)
    state = model.state_dict()
    _check_against(state, {n: s for n, s in stored.items() if not n.endswith(SCALE_SUFFIX)})
    loaded: dict[int, str] = {}
    with torch.no_grad():
        for name, tensor in _stream(stored, block):
            twin = loaded.setdefault(state[name].data_ptr(), name)
            if twin == name:
                state[name].copy_(tensor)
            elif not torch.equal(state[name], tensor.to(state[name])):
                raise ExportError(
                    f"{name} and {twin} are one tensor in the model and differ in the checkpoint; "
                    "set tie_word_embeddings in config.json to false"
                )


def dequantize_checkpoint(
    path_or_state: Path | str | Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Go through a block-FP8 checkpoint one tensor at a time, as `load_fp8` gives them.

    Args: path_or_state: a model directory, or its tensors by name, with tiles of 128 x 128.
    Raises: ExportError; all that names, dtypes and shapes can tell, before the first tensor.
    """
    if isinstance(path_or_state, Mapping):
        stored, block = _of_state(path_or_state), (BLOCK, BLOCK)
    else:
        stored, block = _open(Path(path_or_state))
    _check_layout(stored, block)
    return _stream(stored, block)


def _stream(stored: Mapping[str, _Stored], block: tuple[int, int]) -> Iterator[tuple[str, Tensor]]:
    for name, entry in stored.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        if entry.dtype not in _E4M3_NAMES:
            yield name, entry.read()
            continue
        scale = stored[_scale_of(name)].read()
        yield name, _dequantized(name, entry.read(), scale, block)


def _dequantized(name: str, codes_NK: Tensor, scale_nk: Tensor, block: tuple[int, int]) -> Tensor:
    q = Quantized(codes_NK, scale_nk.float().contiguous(), QuantSpec(block=block))
    values_NK = dequantize(q)
    is_nan_NK = (codes_NK.view(torch.uint8) & _NAN_CODE) == _NAN_CODE  # dequantize reads 480
    if bool(is_nan_NK.any()) or not bool(values_NK.isfinite().all()):
        raise ExportError(
            f"{name} holds NaN or infinity, or its {_scale_of(name)} does; {_COPY_AGAIN}"
        )
    if bool(((values_NK == 0) & (codes_NK.float() != 0)).any()):
        raise ExportError(
            f"{_scale_of(name)} has scales of zero over weights that are not; it may have been "
            "stored in fp16, which holds nothing below 6e-8: export again with fp32 scales"
        )
    return values_NK


def _check_layout(stored: Mapping[str, _Stored], block: tuple[int, int]) -> None:
    """Check what can be told without reading a tensor: FP8 weights and scales come in pairs."""
    for name, entry in stored.items():
        if name.endswith(STATIC_SUFFIXES):
            raise ExportError(
                f"{name}: the checkpoint has static activation scales, which are not read here; "
                "load it with transformers and save it in bf16"
            )
        if name.endswith(SCALE_SUFFIX):
            weight = stored.get(name.removesuffix(SCALE_SUFFIX) + ".weight")
            if weight is None or weight.dtype not in _E4M3_NAMES:
                found = "no weight" if weight is None else f"a weight in {weight.dtype}"
                raise ExportError(f"{name} has {found} beside it, wanted E4M3; {_COPY_AGAIN}")
        elif entry.dtype in _E4M3_NAMES:
            _check_pair(name, entry, stored.get(_scale_of(name)), block)
        elif entry.dtype.startswith(("F8", "torch.float8")):
            raise ExportError(f"{name} is in {entry.dtype}; wanted E4M3: load it with transformers")


def _check_pair(name: str, weight: _Stored, scale: _Stored | None, block: tuple[int, int]) -> None:
    if scale is None:
        raise ExportError(f"{name} is in E4M3 and {_scale_of(name)} is missing; {_COPY_AGAIN}")
    if len(weight.shape) != 2:
        raise ExportError(
            f"{name} has shape {weight.shape}; wanted a matrix: load models with stacked experts "
            "with transformers"
        )
    wanted = tuple(-(-side // tile) for side, tile in zip(weight.shape, block, strict=True))
    if scale.shape != wanted or scale.dtype not in _SCALE_NAMES:
        raise ExportError(
            f"{_scale_of(name)} is {scale.dtype} {scale.shape}; wanted floats {wanted} for a "
            f"weight {weight.shape} in tiles of {block}; {_COPY_AGAIN}"
        )


def _check_against(state: Mapping[str, Tensor], stored: Mapping[str, _Stored]) -> None:
    """Check that a checkpoint has each tensor of the model, tied ones once, and no other."""
    held = {state[name].data_ptr() for name in stored if name in state}
    differing = [name for name in stored if name not in state]
    differing += [n for n, t in state.items() if n not in stored and t.data_ptr() not in held]
    differing += [n for n, s in stored.items() if n in state and s.shape != tuple(state[n].shape)]
    if differing:
        raise ExportError(
            f"the checkpoint is of another model or not whole: {len(differing)} tensors differ in "
            f"name or shape, the first is {differing[0]}; give the model of its config.json, or "
            f"{_COPY_AGAIN}"
        )


def _open(path: Path) -> tuple[dict[str, _Stored], tuple[int, int]]:
    """Return all tensors of a directory, unread, and the shape of its tiles."""
    block = _block_of(path)
    if not (path / INDEX_FILE).exists():
        return _of_file(path / SINGLE_FILE), block
    where = _read_json(path / INDEX_FILE).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ExportError(f"{path / INDEX_FILE} has no weight_map; {_COPY_AGAIN}")
    stored: dict[str, _Stored] = {}
    for file in sorted(set(map(str, where.values()))):
        if Path(file).name != file:
            raise ExportError(f"{path / INDEX_FILE} names {file!r}, outside its directory")
        stored |= _of_file(path / file)
    if odd := sorted(stored.keys() ^ where.keys()):
        raise ExportError(
            f"{path / INDEX_FILE} and the files differ in {len(odd)} tensors, the first is "
            f"{odd[0]}; {_COPY_AGAIN}"
        )
    return stored, block


def _block_of(path: Path) -> tuple[int, int]:
    """Return the shape of the tiles, once it is sure that the directory is block-FP8."""
    quantization = _read_json(path / CONFIG_FILE).get("quantization_config")
    if not isinstance(quantization, dict):
        raise ExportError(
            f"{path / CONFIG_FILE} has no quantization_config: the weights are not FP8; load them "
            "with transformers"
        )
    found = {key: quantization.get(key) for key in ("quant_method", "activation_scheme")}
    if found["quant_method"] != "fp8" or found["activation_scheme"] not in ("dynamic", None):
        raise ExportError(
            f"{path / CONFIG_FILE} says {found}; wanted quant_method 'fp8' with dynamic "
            "activations: load the model with transformers and save it in bf16"
        )
    match quantization.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case other:
            raise ExportError(
                f"{path / CONFIG_FILE} has weight_block_size {other!r}; wanted [128, 128]: load "
                "the model with transformers and save it in bf16"
            )


def _of_state(state: Mapping[str, Tensor]) -> dict[str, _Stored]:
    def reader(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    return {n: _Stored(str(t.dtype), tuple(t.shape), reader(t)) for n, t in state.items()}


def _of_file(file: Path) -> dict[str, _Stored]:
    """Return the tensors of a safetensors file, each read from disk when asked for."""
    with _damage_in(file):
        handle: Any = safe_open(file, "pt")  # the file is mapped, not read
        slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
        return {
            name: _Stored(found.get_dtype(), tuple(found.get_shape()), _reader(handle, file, name))
            for name, found in slices.items()
        }


def _reader(handle: Any, file: Path, name: str) -> Callable[[], Tensor]:
    def read() -> Tensor:
        with _damage_in(file):
            tensor: Tensor = handle.get_tensor(name)
            return tensor

    return read


@contextmanager
def _damage_in(file: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise ExportError(f"{file}: no such file; {_COPY_AGAIN}") from error
    except (SafetensorError, OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ExportError(f"{file} is damaged ({error}); {_COPY_AGAIN}") from error


def _read_json(file: Path) -> dict[str, Any]:
    with _damage_in(file):
        content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ExportError(f"{file} holds no JSON object; {_COPY_AGAIN}")
    return content


def _scale_of(weight_name: str) -> str:
    return weight_name.removesuffix(".weight") + SCALE_SUFFIX
