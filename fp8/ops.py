"""Quantisers as operators of torch: opaque to torch.compile, one Triton kernel each on a GPU.

The implementation here, in plain torch, runs on every device and is what the kernels are tested
against; on CUDA with compute capability 8.9 and Triton the kernel runs instead. Codes are E4M3,
scales float32 with x ~ codes * scale, one per 1 x 128 block along the last axis (weights:
128 x 128). Scales of rows have strides (1, rows), the layout that Hopper's scaled GEMM reads.
No gradient passes: the layers that call these have their own.
Shapes: R, C = rows, columns; r, c = blocks of 128 along them, the last one maybe short.
"""

import functools
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from fp8.formats import E4M3
from fp8.quantize import Quantized, dequantize, quantize
from fp8.recipe import QuantSpec

Arguments = ParamSpec("Arguments")
Results = TypeVar("Results")

BLOCK = 128
_SMALLEST_CAPABILITY = (8, 9)  # the first with FP8 conversions

Two = tuple[Tensor, Tensor]
Three = tuple[Tensor, Tensor, Tensor]
Four = tuple[Tensor, Tensor, Tensor, Tensor]
Six = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def kernels_refusal(device: torch.device) -> str | None:
    """Say why the Triton kernels do not run on `device`; None when they do."""
    if device.type != "cuda":
        return f"Triton kernels run on CUDA, not on {device.type}"
    if torch.version.hip is not None:
        return "the Triton kernels are written for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < _SMALLEST_CAPABILITY:
        return f"compute capability is {capability[0]}.{capability[1]}; FP8 needs 8.9"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; the reference in torch runs, more slowly"
    return None


def _operator(
    kernels: str, shapes: Callable[..., tuple[Tensor, ...]]
) -> Callable[[Callable[Arguments, Results]], Callable[Arguments, Results]]:
    """Make the decorated reference an operator of torch.

    Args: kernels: the module of fp8.backends whose function of the same name runs on CUDA, where
        it can. shapes: gives, for the same arguments, new tensors of the results' shapes.
    """

    def operator_of(reference: Callable[Arguments, Results]) -> Callable[Arguments, Results]:
        name = reference.__name__

        def on_cuda(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Results:
            module = _kernels(kernels, cast(Tensor, args[0]).device)
            function: Callable[Arguments, Results] = (
                reference if module is None else getattr(module, name)
            )
            return function(*args, **kwargs)

        operator = torch.library.custom_op(f"cofuse_fp8::{name}", reference, mutates_args=())
        operator.register_fake(shapes)
        operator.register_kernel("cuda")(on_cuda)
        return operator

    return operator_of


@functools.cache
def _kernels(module: str, device: torch.device) -> ModuleType | None:
    """Import the kernels where they run: importing Triton is slow and not possible everywhere."""
    if kernels_refusal(device) is not None:
        return None
    return importlib.import_module(f"fp8.backends.{module}")


@_operator("triton_quantize", lambda x, _: _fake_rows(x))
def quantize_1x128(x: Tensor, power_of_two: bool) -> Two:
    """Quantise x [R, C] along C: codes [R, C], scale [R, c]."""
    return _rows(x, power_of_two)


@_operator("triton_quantize", lambda x, _: _fake_both(x))
def quantize_1x128_dual(x: Tensor, power_of_two: bool) -> Four:
    """Quantise x [R, C] along both axes: codes [R, C], scale [R, c]; codes [C, R], scale [C, r]."""
    return _both(x, power_of_two)


@_operator("triton_quantize", lambda w, _: _fake_tiles(w))
def quantize_128x128_dual(w: Tensor, power_of_two: bool) -> Three:
    """Quantise w [R, C] in tiles: codes [R, C], the same transposed [C, R], scale [r, c]."""
    scale_format = _rows_spec(power_of_two).scale_format
    q = quantize(w, QuantSpec(block=(BLOCK, BLOCK), scale_format=scale_format))
    transpose = q.codes.t().clone(memory_format=torch.contiguous_format)  # never a view of codes
    return q.codes, transpose, q.scale


@_operator("triton_quantize", lambda codes, _: _fake_rows(codes.t()))
def transpose_requantize(codes: Tensor, scale: Tensor) -> Two:
    """Turn codes [R, C], power-of-two scale [R, c] into those of the transpose [C, R], [C, r]."""
    return _rows(dequantize(Quantized(codes, scale, _rows_spec(True))).t(), True)


@_operator("triton_fused", lambda x, *_: _fake_norm(x))
def rmsnorm_quantize(x: Tensor, weight: Tensor, eps: float, power_of_two: bool) -> Four:
    """Normalise the rows of x [R, C] and quantise them.

    y = weight * round(x * rstd), rounded to x.dtype at each step, as the models' own norms do; so
    the codes are those of the separate steps. The sum of squares is ordered by the device.

    Returns: y [R, C] in x.dtype; its codes [R, C]; its scale [R, c]; rstd [R], float32.
    """
    source = x.float()
    rstd = torch.rsqrt(source.square().mean(-1) + eps)
    normal = (source * rstd[:, None]).to(x.dtype).float()
    y = (normal * weight.float()).to(x.dtype)
    return (y, *_rows(y, power_of_two), rstd)


@_operator("triton_fused", lambda gate, *_: _fake_rows(gate) + _fake_rows(gate) + _fake_rows(gate))
def swiglu_quantize(gate: Tensor, up: Tensor, power_of_two: bool) -> Six:
    """Quantise silu(gate) * up [R, C], and gate and up themselves for backward.

    The product is rounded to gate.dtype once, and quantised from there; see fp8.fused.

    Returns: codes [R, C] and scale [R, c] of the product, of gate, of up.
    """
    product = torch.nn.functional.silu(gate.float()).mul_(up.float()).to(gate.dtype)
    return (*_rows(product, power_of_two), *_rows(gate, power_of_two), *_rows(up, power_of_two))


@_operator("triton_fused", lambda dp, *_: _fake_both(dp) + _fake_both(dp))
def swiglu_backward_quantize(
    dp: Tensor,
    gate_codes: Tensor,
    gate_scale: Tensor,
    up_codes: Tensor,
    up_scale: Tensor,
    power_of_two: bool,
) -> Eight:
    """Turn the product's gradient dp [R, C] into quantised gradients of gate and up.

    gate and up are what `swiglu_quantize` kept. Gradients are rounded to dp.dtype, then quantised.

    Returns: codes [R, C], scale [R, c], codes [C, R], scale [C, r] of gate's gradient; of up's.
    """
    spec, d = _rows_spec(power_of_two), dp.float()
    gate = dequantize(Quantized(gate_codes, gate_scale, spec))
    up = dequantize(Quantized(up_codes, up_scale, spec))
    sigmoid = torch.sigmoid(gate)
    swish = gate * sigmoid
    d_gate = (d * up * (sigmoid + swish - swish * sigmoid)).to(dp.dtype)
    d_up = (d * swish).to(dp.dtype)
    return (*_both(d_gate, power_of_two), *_both(d_up, power_of_two))


def _rows_spec(power_of_two: bool) -> QuantSpec:
    return QuantSpec(block=(1, BLOCK), scale_format="power_of_two" if power_of_two else "fp32")


def _rows(x: Tensor, power_of_two: bool) -> Two:
    q = quantize(x, _rows_spec(power_of_two))
    return q.codes, _by_blocks(q.scale)


def _both(x: Tensor, power_of_two: bool) -> Four:
    return (*_rows(x, power_of_two), *_rows(x.t(), power_of_two))


def _by_blocks(scale: Tensor) -> Tensor:
    """Lay [R, c] out with strides (1, R)."""
    rows, count = scale.shape
    return scale.new_empty(count, rows).copy_(scale.t()).t()


def _fake_rows(x: Tensor) -> Two:
    R, C = x.shape
    return _new_codes(x, R, C), x.new_empty(_blocks(C), R, dtype=torch.float32).t()


def _fake_both(x: Tensor) -> Four:
    return (*_fake_rows(x), *_fake_rows(x.t()))


def _fake_tiles(w: Tensor) -> Three:
    R, C = w.shape
    scale = w.new_empty(_blocks(R), _blocks(C), dtype=torch.float32)
    return _new_codes(w, R, C), _new_codes(w, C, R), scale


def _fake_norm(x: Tensor) -> Four:
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    return (x.new_empty(x.shape), *_fake_rows(x), rstd)


def _new_codes(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty(rows, columns, dtype=E4M3.dtype)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
