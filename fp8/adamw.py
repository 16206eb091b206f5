"""The AdamW step on 8-bit moments: its arithmetic, in torch, and the custom op around it.

The op is `cofuse_fp8::float8_adamw_step`. `reference_steps` is what it does on any device, and what
its Triton kernel (`fp8.backends.triton_adamw`) must equal; therefore every operation rounds once,
and none is fused with another.

Shapes: G = groups, B = elements of a group (GROUP; the last group may be short).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from fp8.moments import (
    GROUP,
    decode_first,
    decode_second,
    dither,
    encode_first,
    encode_second,
    groups_of,
    round_stochastically,
)

_BATCH: Final = 1024 * GROUP
"""Elements done at a time: few enough for their temporaries to stay in a core's cache."""


class Factors(NamedTuple):
    """One AdamW step as the numbers its arithmetic multiplies and divides by."""

    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    keep: float
    """1 - lr * weight_decay."""
    step_size: float
    """lr / (1 - beta1**step)."""
    correction: float
    """1 / sqrt(1 - beta2**step)."""
    eps: float

    @classmethod
    def of_step(
        cls, step: int, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> "Factors":
        """Return the factors of step number `step`, counted from 1."""
        beta1, beta2 = betas
        size, correction = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
        keep = 1 - lr * weight_decay
        return cls(beta1, 1 - beta1, beta2, 1 - beta2, keep, size, correction, eps)


class Operands(NamedTuple):
    """The tensors of one parameter's step: contiguous, and all but the scales of one shape."""

    param: Tensor
    """float32; or bfloat16 with a master or with a seed."""
    master: Tensor | None
    """float32: the weights that a bfloat16 param is the nearest of."""
    seed: Tensor | None
    """int32, one element: a bfloat16 param has no master and is rounded stochastically."""
    grad: Tensor
    """float32 or bfloat16; finite (`encode_first` says what comes of it if not)."""
    m_codes: Tensor
    """uint8, the bytes of E4M3."""
    m_scale: Tensor
    """float32 [G]; groups are counted over the flattened elements."""
    v_codes: Tensor
    """uint8."""
    v_scale: Tensor
    """float32 [G]."""


def reference_steps(work: Iterable[Operands], factors: Factors, step: int) -> None:
    """Do what `float8_adamw_step` does to each of them, in torch and on one device.

    Small tensors are done together and large ones in pieces: the bits are the same, and an
    operation on a CPU takes a microsecond before it starts.
    """
    dither_B: Tensor | None = None
    for batch in _batches(piece for operands in work for piece in _pieces(operands)):
        if dither_B is None:
            dither_B = dither(step, batch[0].operands.grad.device)
        _step_batch(batch, factors, dither_B)


class _Piece(NamedTuple):
    """Some groups of a tensor; one-dimensional views."""

    operands: Operands
    first: int
    """Place of its first element in the tensor."""


def _pieces(operands: Operands) -> Iterator[_Piece]:
    param, master, seed, grad, m_codes, m_scale, v_codes, v_scale = operands
    n = param.numel()
    whole = n - n % GROUP
    ends = [*range(_BATCH, whole, _BATCH), whole, n]
    for first, end in zip([0, *ends], ends, strict=False):
        if first == end:
            continue
        part, groups = slice(first, end), slice(first // GROUP, groups_of(end))
        views = Operands(
            param.view(-1)[part],
            None if master is None else master.view(-1)[part],
            seed,
            grad.view(-1)[part],
            m_codes.view(-1)[part],
            m_scale[groups],
            v_codes.view(-1)[part],
            v_scale[groups],
        )
        yield _Piece(views, first)


def _batches(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Put pieces of whole groups together, up to _BATCH elements; a short group stays alone."""
    batch: list[_Piece] = []
    elements = 0
    for piece in pieces:
        n = piece.operands.param.numel()
        if n % GROUP:
            yield [piece]
            continue
        if batch and elements + n > _BATCH:
            yield batch
            batch, elements = [], 0
        batch.append(piece)
        elements += n
    if batch:
        yield batch


def _step_batch(batch: list[_Piece], factors: Factors, dither_B: Tensor) -> None:
    params, _, _, grads, *moments = zip(*(piece.operands for piece in batch), strict=True)
    m_codes, m_scale, v_codes, v_scale = (_joined(parts) for parts in moments)
    shape = (-1, min(GROUP, m_codes.numel()))
    m_GB = decode_first(m_codes.view(shape), m_scale)
    v_GB = decode_second(v_codes.view(shape), v_scale)
    g_GB = _joined(grads).view(shape).float()
    m_GB.mul_(factors.beta1).add_(g_GB * factors.one_minus_beta1)
    v_GB.mul_(factors.beta2).add_((g_GB * g_GB).mul_(factors.one_minus_beta2))
    written = (*encode_first(m_GB), *encode_second(v_GB, dither_B))
    for targets, values in zip(moments, written, strict=True):
        _write(targets, values)
    change_GB = m_GB.div_(v_GB.sqrt_().mul_(factors.correction).add_(factors.eps))
    changes = _split(change_GB.mul_(factors.step_size), params)
    for piece, change in zip(batch, changes, strict=True):
        _move(piece, factors.keep, change)


def _joined(parts: tuple[Tensor, ...]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _write(targets: tuple[Tensor, ...], values: Tensor) -> None:
    for target, part in zip(targets, _split(values, targets), strict=True):
        target.copy_(part)


def _split(values: Tensor, like: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.split_with_sizes(values.view(-1), [part.numel() for part in like])


def _move(piece: _Piece, keep: float, change: Tensor) -> None:
    """Decay the weights of a piece and take `change` away from them."""
    param, master, seed = piece.operands[:3]
    if seed is not None:
        moved = param.float().mul_(keep).sub_(change)
        param.copy_(round_stochastically(moved, seed, piece.first))
    elif master is not None:
        param.copy_(master.mul_(keep).sub_(change))
    else:
        param.mul_(keep).sub_(change)


@torch.library.custom_op(
    "cofuse_fp8::float8_adamw_step",
    mutates_args=("param", "master", "m_codes", "m_scale", "v_codes", "v_scale"),
)
def float8_adamw_step(  # noqa: PLR0913 (an op takes its tensors one by one)
    param: Tensor,
    master: Tensor | None,
    seed: Tensor | None,
    grad: Tensor,
    m_codes: Tensor,
    m_scale: Tensor,
    v_codes: Tensor,
    v_scale: Tensor,
    factors: list[float],
    step: int,
) -> None:
    """Do one AdamW step in place: read the moments, move the weights, write the moments.

    Args:
        param: float32 or bfloat16; this and the next seven are the fields of Operands.
        master: float32 or None.
        seed: int32 or None.
        grad: float32 or bfloat16.
        m_codes: uint8.
        m_scale: float32 [G].
        v_codes: uint8.
        v_scale: float32 [G].
        factors: the fields of Factors.
        step: counted from 1.
    """
    work = Operands(param, master, seed, grad, m_codes, m_scale, v_codes, v_scale)
    reference_steps([work], Factors(*factors), step)


@float8_adamw_step.register_fake
def _(*_args: object) -> None:
    return None


@float8_adamw_step.register_kernel("cuda")
def _(*arguments: Any) -> None:
    *operands, factors, step = arguments
    fused_steps()([Operands(*operands)], Factors(*factors), step)


@cache
def fused_steps() -> Callable[[Iterable[Operands], Factors, int], None]:
    """Return the Triton steps, or the reference with a warning where Triton is not installed."""
    if find_spec("triton") is None:
        warnings.warn(
            "Triton is not installed: Float8AdamW runs as separate torch operations on the GPU, "
            "which is several times slower; pip install triton",
            RuntimeWarning,
            stacklevel=2,
        )
        return reference_steps
    from fp8.backends.triton_adamw import triton_steps

    return triton_steps
