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
from types import ModuleType

import torch
from torch import Tensor

from fp8.formats import E4M3
from fp8.quantize import Quantized, dequantize, quantize
from fp8.recipe import QuantSpec

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


@torch.library.custom_op("cofuse_fp8::quantize_1x128", mutates_args=())
def quantize_1x128(x: Tensor, power_of_two: bool) -> Two:
    """Quantise x [R, C] along C: codes [R, C], scale [R, c]."""
    return _rows(x, power_of_two)


@quantize_1x128.register_fake
def _(x: Tensor, power_of_two: bool) -> Two:
    return _fake_rows(x)


@quantize_1x128.register_kernel("cuda")
def _(x: Tensor, power_of_two: bool) -> Two:
    kernels = _quantizers(x.device)
    result: Two = (_rows if kernels is None else kernels.quantize_1x128)(x, power_of_two)
    return result


@torch.library.custom_op("cofuse_fp8::quantize_1x128_dual", mutates_args=())
def quantize_1x128_dual(x: Tensor, power_of_two: bool) -> Four:
    """Quantise x [R, C] along both axes: codes [R, C], scale [R, c]; codes [C, R], scale [C, r]."""
    return _both(x, power_of_two)


@quantize_1x128_dual.register_fake
def _(x: Tensor, power_of_two: bool) -> Four:
    return _fake_both(x)


@quantize_1x128_dual.register_kernel("cuda")
def _(x: Tensor, power_of_two: bool) -> Four:
    kernels = _quantizers(x.device)
    result: Four = (_both if kernels is None else kernels.quantize_1x128_dual)(x, power_of_two)
    return result


@torch.library.custom_op("cofuse_fp8::quantize_128x128_dual", mutates_args=())
def quantize_128x128_dual(w: Tensor, power_of_two: bool) -> Three:
    """Quantise w [R, C] in tiles: codes [R, C], the same transposed [C, R], scale [r, c]."""
    return _tiles(w, power_of_two)


@quantize_128x128_dual.register_fake
def _(w: Tensor, power_of_two: bool) -> Three:
    R, C = w.shape
    scale = w.new_empty(_blocks(R), _blocks(C), dtype=torch.float32)
    return _new_codes(w, R, C), _new_codes(w, C, R), scale


@quantize_128x128_dual.register_kernel("cuda")
def _(w: Tensor, power_of_two: bool) -> Three:
    kernels = _quantizers(w.device)
    result: Three = (_tiles if kernels is None else kernels.quantize_128x128_dual)(w, power_of_two)
    return result


@torch.library.custom_op("cofuse_fp8::transpose_requantize", mutates_args=())
def transpose_requantize(codes: Tensor, scale: Tensor) -> Two:
    """Turn codes [R, C], power-of-two scale [R, c] into those of the transpose [C, R], [C, r]."""
    return _transposed(codes, scale)


@transpose_requantize.register_fake
def _(codes: Tensor, scale: Tensor) -> Two:
    return _fake_rows(codes.t())


@transpose_requantize.register_kernel("cuda")
def _(codes: Tensor, scale: Tensor) -> Two:
    kernels = _quantizers(codes.device)
    result: Two = (_transposed if kernels is None else kernels.transpose_requantize)(codes, scale)
    return result


@torch.library.custom_op("cofuse_fp8::rmsnorm_quantize", mutates_args=())
def rmsnorm_quantize(x: Tensor, weight: Tensor, eps: float, power_of_two: bool) -> Four:
    """Normalise the rows of x [R, C] and quantise them.

    y = weight * round(x * rstd), rounded to x.dtype at each step, as the models' own norms do; so
    the codes are those of the separate steps. The sum of squares is ordered by the device.

    Returns: y [R, C] in x.dtype; its codes [R, C]; its scale [R, c]; rstd [R], float32.
    """
    return _rmsnorm(x, weight, eps, power_of_two)


@rmsnorm_quantize.register_fake
def _(x: Tensor, weight: Tensor, eps: float, power_of_two: bool) -> Four:
    rstd = x.new_empty(x.shape[0], dtype=torch.float32)
    return (x.new_empty(x.shape), *_fake_rows(x), rstd)


@rmsnorm_quantize.register_kernel("cuda")
def _(x: Tensor, weight: Tensor, eps: float, power_of_two: bool) -> Four:
    kernels = _fused(x.device)
    norm = _rmsnorm if kernels is None else kernels.rmsnorm_quantize
    result: Four = norm(x, weight, eps, power_of_two)
    return result


@torch.library.custom_op("cofuse_fp8::swiglu_quantize", mutates_args=())
def swiglu_quantize(gate: Tensor, up: Tensor, power_of_two: bool) -> Six:
    """Quantise silu(gate) * up [R, C], and gate and up themselves for backward.

    The product is rounded to gate.dtype once, and quantised from there; see fp8.fused.

    Returns: codes [R, C] and scale [R, c] of the product, of gate, of up.
    """
    return _swiglu(gate, up, power_of_two)


@swiglu_quantize.register_fake
def _(gate: Tensor, up: Tensor, power_of_two: bool) -> Six:
    return (*_fake_rows(gate), *_fake_rows(gate), *_fake_rows(gate))


@swiglu_quantize.register_kernel("cuda")
def _(gate: Tensor, up: Tensor, power_of_two: bool) -> Six:
    kernels = _fused(gate.device)
    swiglu = _swiglu if kernels is None else kernels.swiglu_quantize
    result: Six = swiglu(gate, up, power_of_two)
    return result


@torch.library.custom_op("cofuse_fp8::swiglu_backward_quantize", mutates_args=())
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
    return _swiglu_backward(dp, gate_codes, gate_scale, up_codes, up_scale, power_of_two)


@swiglu_backward_quantize.register_fake
def _(
    dp: Tensor,
    gate_codes: Tensor,
    gate_scale: Tensor,
    up_codes: Tensor,
    up_scale: Tensor,
    power_of_two: bool,
) -> Eight:
    return (*_fake_both(dp), *_fake_both(dp))


@swiglu_backward_quantize.register_kernel("cuda")
def _(
    dp: Tensor,
    gate_codes: Tensor,
    gate_scale: Tensor,
    up_codes: Tensor,
    up_scale: Tensor,
    power_of_two: bool,
) -> Eight:
    kernels = _fused(dp.device)
    backward = _swiglu_backward if kernels is None else kernels.swiglu_backward_quantize
    result: Eight = backward(dp, gate_codes, gate_scale, up_codes, up_scale, power_of_two)
    return result


@functools.cache
def _quantizers(device: torch.device) -> ModuleType | None:
    """Import the kernels where they run: importing Triton is slow and not possible everywhere."""
    if kernels_refusal(device) is not None:
        return None
    from fp8.backends import triton_quantize

    return triton_quantize


@functools.cache
def _fused(device: torch.device) -> ModuleType | None:
    if kernels_refusal(device) is not None:
        return None
    from fp8.backends import triton_fused

    return triton_fused


def _rows_spec(power_of_two: bool) -> QuantSpec:
    return QuantSpec(block=(1, BLOCK), scale_format="power_of_two" if power_of_two else "fp32")


def _rows(x: Tensor, power_of_two: bool) -> Two:
    q = quantize(x, _rows_spec(power_of_two))
    return q.codes, _by_blocks(q.scale)


def _both(x: Tensor, power_of_two: bool) -> Four:
    return (*_rows(x, power_of_two), *_rows(x.t(), power_of_two))


def _tiles(w: Tensor, power_of_two: bool) -> Three:
    scale_format = _rows_spec(power_of_two).scale_format
    q = quantize(w, QuantSpec(block=(BLOCK, BLOCK), scale_format=scale_format))
    transpose = q.codes.t().clone(memory_format=torch.contiguous_format)  # never a view of codes
    return q.codes, transpose, q.scale


def _transposed(codes: Tensor, scale: Tensor) -> Two:
    return _rows(dequantize(Quantized(codes, scale, _rows_spec(True))).t(), True)


def _rmsnorm(x: Tensor, weight: Tensor, eps: float, power_of_two: bool) -> Four:
    source = x.float()
    rstd = torch.rsqrt(source.square().mean(-1) + eps)
    normal = (source * rstd[:, None]).to(x.dtype).float()
    y = (normal * weight.float()).to(x.dtype)
    return (y, *_rows(y, power_of_two), rstd)


def _swiglu(gate: Tensor, up: Tensor, power_of_two: bool) -> Six:
    product = torch.nn.functional.silu(gate.float()).mul_(up.float()).to(gate.dtype)
    return (*_rows(product, power_of_two), *_rows(gate, power_of_two), *_rows(up, power_of_two))


def _swiglu_backward(
    dp: Tensor,
    gate_codes: Tensor,
    gate_scale: Tensor,
    up_codes: Tensor,
    up_scale: Tensor,
    power_of_two: bool,
) -> Eight:
    spec, d = _rows_spec(power_of_two), dp.float()
    gate = dequantize(Quantized(gate_codes, gate_scale, spec))
    up = dequantize(Quantized(up_codes, up_scale, spec))
    sigmoid = torch.sigmoid(gate)
    swish = gate * sigmoid
    d_gate = (d * up * (sigmoid + swish - swish * sigmoid)).to(dp.dtype)
    d_up = (d * swish).to(dp.dtype)
    return (*_both(d_gate, power_of_two), *_both(d_up, power_of_two))


def _by_blocks(scale: Tensor) -> Tensor:
    """Lay [R, c] out with strides (1, R)."""
    rows, count = scale.shape
    return scale.new_empty(count, rows).copy_(scale.t()).t()


def _fake_rows(x: Tensor) -> Two:
    R, C = x.shape
    return _new_codes(x, R, C), x.new_empty(_blocks(C), R, dtype=torch.float32).t()


def _fake_both(x: Tensor) -> Four:
    return (*_fake_rows(x), *_fake_rows(x.t()))


def _new_codes(like: Tensor, rows: int, columns: int) -> Tensor:
    return like.new_empty(rows, columns, dtype=E4M3.dtype)


def _blocks(size: int) -> int:
    return -(-size // BLOCK)
