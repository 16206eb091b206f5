"""Checkpoints to ship: the Hugging Face block-FP8 layout, and bf16. `fp8.block_layout` reads both.

The FP8 layout is that of DeepSeek-V3, which transformers, vLLM and SGLang load: X.weight holds
E4M3 codes [N, K], X.weight_scale_inv the fp32 decode scale of each 128 x 128 tile (in spite of its
name: weight = code * scale), and config.json says so. The codes written are those that the FP8
layers compute with. An export is whole or absent, and no more than one shard of it is held.
Shapes: N = out_features, K = in_features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

import torch
from torch import Tensor, nn

from fp8.block_layout import (
    BLOCK,
    SCALE_SUFFIX,
    ExportError,
    dequantize_checkpoint,
    load_fp8,
    load_fp8_into,
)
from fp8.checkpoint import model_state
from fp8.formats import E4M3
from fp8.linear import Float8Linear
from fp8.model_directory import (
    Entry,
    Saveable,
    draft_of,
    write_companions,
    write_config,
    write_shards,
)
from fp8.quantize import dequantize, quantize

SHARD_BYTES: Final = 5_000_000_000
FUSED_WHEN_SERVED: Final = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that serving engines join into one matrix, which has to be of one precision."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What an export wrote."""

    path: Path
    fp8: tuple[str, ...]
    """Modules whose weight is stored in FP8."""
    kept: Mapping[str, str]
    """Every other module that holds a matrix, with the reason."""
    size_bytes: int
    """Of all tensors together."""


def save_pretrained_fp8(
    model: nn.Module,
    path: Path | str,
    tokenizer: Saveable | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = SHARD_BYTES,
) -> Export:
    """Write the model in the Hugging Face block-FP8 layout; returns what is FP8 and what is not.

    Embeddings, head, norms, biases and unconverted layers are stored in `dtype`. So is the weight
    of an FP8 layer with a side above 128 that is no multiple of 128, after quantisation (exact in
    bf16 with power-of-two scales): transformers 5.23 takes the tile for side / tiles, and so fails
    on 576 and, without a word, misreads 192. What serving engines join with such a layer goes with
    it. All of them are named in modules_to_not_convert and in the result.

    Args:
        model: a Hugging Face model converted with BlockScaling(block=128); it is not changed.
        path: the directory to make; it must not hold anything yet.
        tokenizer: written beside the weights when given.
        dtype: of everything that is not FP8, and what loaders will compute in.
        max_shard_bytes: upper bound of a file, but for a tensor that is larger by itself.

    Raises: ExportError when the recipe has no such layout, a tensor is not finite or not whole, or
        `path` is taken; then nothing is written.
    """
    model = _unwrapped(model)
    layers = _exportable_layers(model)
    kept = _kept_layers(model, layers)
    fp8 = tuple(name for name in layers if name not in kept)
    if not fp8:
        name = next(iter(layers))
        raise ExportError(
            f"no layer of the model fits the block-FP8 layout: {name}: {kept[name]}; write the "
            "model with export_bf16(model, path, weights='quantized')"
        )

    def entry(name: str, tensor: Tensor) -> Entry:
        module = name.removesuffix(".weight")
        if module not in layers or module == name:
            return _plain_entry(name, tensor, dtype)
        if module in kept:
            return _dequantized_entry(name, layers[module], dtype)
        return _fp8_entry(name, layers[module])

    quantization = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [BLOCK, BLOCK],
        "modules_to_not_convert": list(kept),
    }
    entries = [entry(name, tensor) for name, tensor in model_state(model).items()]
    with draft_of(Path(path)) as draft:
        size = write_shards(entries, draft, max_shard_bytes)
        write_config(model, draft, dtype, quantization)
        write_companions(model, tokenizer, draft)
    return Export(path=Path(path), fp8=fp8, kept=MappingProxyType(kept), size_bytes=size)


def export_bf16(
    model: nn.Module,
    path: Path | str,
    tokenizer: Saveable | None = None,
    *,
    weights: Literal["master", "quantized"] = "master",
    max_shard_bytes: int = SHARD_BYTES,
) -> Export:
    """Write the model as an ordinary bf16 checkpoint; any recipe, and none, will do.

    Args:
        model: a Hugging Face model; it is not changed.
        path: the directory to make; it must not hold anything yet.
        tokenizer: written beside the weights when given.
        weights: "master": the parameters as trained, rounded to bf16: what to train on from.
            "quantized": FP8 layers get the values that their GEMMs read: what was measured in
            FP8 training. Exact in bf16 when scales are powers of two (BlockScaling, MXFP8);
            otherwise rounded to bf16 once more.
        max_shard_bytes: upper bound of a file, but for a tensor that is larger by itself.

    Raises: ExportError when a tensor is not finite or not whole, or `path` is taken; then nothing
        is written.
    """
    if weights not in ("master", "quantized"):
        raise ExportError(f"weights is {weights!r}; wanted 'master' or 'quantized'")
    model, dtype = _unwrapped(model), torch.bfloat16
    layers = _float8_layers(model) if weights == "quantized" else {}

    def entry(name: str, tensor: Tensor) -> Entry:
        layer = layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        return (
            _dequantized_entry(name, layer, dtype) if layer else _plain_entry(name, tensor, dtype)
        )

    entries = [entry(name, tensor) for name, tensor in model_state(model).items()]
    with draft_of(Path(path)) as draft:
        size = write_shards(entries, draft, max_shard_bytes)
        write_config(model, draft, dtype, None)
        write_companions(model, tokenizer, draft)
    kept = {name: "bf16 was asked for" for name in _matrices(model)}
    return Export(path=Path(path), fp8=(), kept=MappingProxyType(kept), size_bytes=size)


def _exportable_layers(model: nn.Module) -> dict[str, Float8Linear]:
    """Return the FP8 layers whose weight the layout can hold, by name."""
    layers = _float8_layers(model)
    if not layers:
        raise ExportError(
            "the model has no FP8 layer; call convert_to_float8_training first, or write it with "
            "export_bf16"
        )
    found = {name: layer for name, layer in layers.items() if _has_tiles(layer)}
    if not found:
        name, layer = next(iter(layers.items()))
        spec = layer.recipe.weight
        raise ExportError(
            f"the weight of {name} has {spec.format.name} codes in blocks of {spec.block} (recipe "
            f"{layer.recipe.name}); the block-FP8 layout holds those of "
            f"BlockScaling(block={BLOCK}) only; write the model with "
            "export_bf16(model, path, weights='quantized')"
        )
    return found


def _has_tiles(layer: Float8Linear) -> bool:
    spec = layer.recipe.weight
    return spec.block == (BLOCK, BLOCK) and spec.format is E4M3


def _float8_layers(model: nn.Module) -> dict[str, Float8Linear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, Float8Linear)}


def _matrices(model: nn.Module) -> list[str]:
    """Return the names of all modules that hold a matrix, a tied head among them."""
    return [
        name
        for name, module in model.named_modules()
        if any(p.ndim >= 2 for p in module.parameters(recurse=False))
    ]


def _kept_layers(model: nn.Module, layers: Mapping[str, Float8Linear]) -> dict[str, str]:
    """Return the modules whose matrix is not stored in FP8, each with the reason."""
    names = model_state(model).keys()
    reasons = {
        name: f"a side of {layer.out_features} x {layer.in_features} is above {BLOCK} and no "
        f"multiple of it, which transformers misreads"
        for name, layer in layers.items()
        if not (_is_readable(layer.out_features) and _is_readable(layer.in_features))
    }
    for name in list(reasons):
        parent, dot, own = name.rpartition(".")
        for other in next((group for group in FUSED_WHEN_SERVED if own in group), ()):
            if f"{parent}{dot}{other}" in layers:
                why = f"serving engines join it with {own}, which is not FP8"
                reasons.setdefault(f"{parent}{dot}{other}", why)
    for name in _matrices(model):
        if name in _float8_layers(model) and name not in layers:
            reasons[name] = "its recipe has no such layout: the weight is stored as trained"
        elif name not in layers:
            reasons[name] = "not an FP8 layer"
        elif f"{name}.weight" not in names:
            reasons[name] = "its weight is tied to another module's"
    return {name: reasons[name] for name in _matrices(model) if name in reasons}


def _is_readable(side: int) -> bool:
    return side <= BLOCK or side % BLOCK == 0


def _plain_entry(name: str, tensor: Tensor, dtype: torch.dtype) -> Entry:
    stored = dtype if tensor.is_floating_point() else tensor.dtype

    def make() -> dict[str, Tensor]:
        return {name: _checked(name, tensor).to("cpu", stored)}

    return Entry(tensor.numel() * stored.itemsize, make)


def _dequantized_entry(name: str, layer: Float8Linear, dtype: torch.dtype) -> Entry:
    def make() -> dict[str, Tensor]:
        q = quantize(_checked(name, layer.weight), layer.recipe.weight)
        return {name: dequantize(q).to("cpu", dtype)}

    return Entry(layer.weight.numel() * dtype.itemsize, make)


def _fp8_entry(name: str, layer: Float8Linear) -> Entry:
    def make() -> dict[str, Tensor]:
        q = quantize(_checked(name, layer.weight), layer.recipe.weight)
        return {name: q.codes.cpu(), name.removesuffix(".weight") + SCALE_SUFFIX: q.scale.cpu()}

    tiles = -(-layer.out_features // BLOCK) * -(-layer.in_features // BLOCK)
    return Entry(layer.weight.numel() + tiles * torch.float32.itemsize, make)


def _checked(name: str, tensor: Tensor) -> Tensor:
    """Return the values of a tensor that may be written."""
    if hasattr(tensor, "full_tensor"):  # a DTensor; not every build of torch has the class
        raise ExportError(
            f"{name} is sharded over processes; gather the model first, or load the training "
            "checkpoint in one process and export that"
        )
    if tensor.is_meta:
        raise ExportError(f"{name} is on the meta device and has no values; load weights first")
    values = tensor.detach()
    if values.is_floating_point() and not bool(values.isfinite().all()):
        raise ExportError(
            f"{name} holds NaN or infinity; nothing is written: go back to a checkpoint from "
            "before the training diverged"
        )
    return values.contiguous()


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile's wrapper, whose names are those of the checkpoint."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


__all__ = [
    "Export",
    "ExportError",
    "dequantize_checkpoint",
    "export_bf16",
    "load_fp8",
    "load_fp8_into",
    "save_pretrained_fp8",
]
