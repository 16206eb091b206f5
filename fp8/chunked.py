"""Losses of a head's logits, of which never more than a chunk exists.

Shapes: N = positions, t = positions of a chunk, V = vocabulary, H = hidden size, M = terms of a
loss.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Terms = Callable[[Tensor, int, int], Tensor]
"""(logits [t, V] of positions start to stop, start, stop) -> the sums [M] of a loss's terms."""


def chunked_terms(
    hidden_NH: Tensor, head: nn.Module, terms_of: Terms, mix_M: Tensor, cuts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return the mixed loss and its terms, with the logits of one chunk at a time.

    The forward already computes the gradients, chunk by chunk, and the backward hands them out:
    nothing is computed twice. A backward that began with the logits' gradients would need the
    logits again, and so run the head's GEMM a fourth time: with a large vocabulary, where this is
    used, that is most of a small model's step. Parameters' gradients are summed over the chunks
    in fp32; those of a chunk are rounded to the parameter's dtype, as autograd gives them.

    Args:
        hidden_NH: what the head reads.
        head: any module [t, H] -> [t, V] that treats positions alone: nn.Linear, Float8Linear.
        terms_of: a chunk's part of each term, already divided by what the whole is a mean over:
            bf16 gradients then have the size they have without chunks, and round alike.
        mix_M: the loss is this times the terms.
        cuts: 0, the edges between chunks, N; no term may need logits of two chunks.

    Returns: the loss, scalar, and the terms [M], which carry no gradient.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    if not (torch.is_grad_enabled() and (parameters or hidden_NH.requires_grad)):
        parts = [terms_of(head(h_tH), start, stop) for h_tH, start, stop in _of(hidden_NH, cuts)]
        terms_M = torch.stack(parts).sum(0)
        return (mix_M * terms_M).sum(), terms_M
    found: tuple[Tensor, Tensor] = _ChunkedTerms.apply(  # type: ignore[no-untyped-call]
        hidden_NH, head, terms_of, mix_M, cuts, *parameters
    )
    return found


class _ChunkedTerms(torch.autograd.Function):
    """See `chunked_terms`. The head's parameters come last, as inputs with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        head: nn.Module,
        terms_of: Terms,
        mix_M: Tensor,
        cuts: Sequence[int],
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wanted_hidden = ctx.needs_input_grad[0]
        sums = [torch.zeros_like(p, dtype=_wide(p)) for p in parameters]
        grad_NH = torch.zeros_like(hidden_NH) if wanted_hidden else None
        total_M = torch.zeros_like(mix_M)
        for h_tH, start, stop in _of(hidden_NH, cuts):
            with torch.enable_grad():
                leaf_tH = h_tH.detach().requires_grad_(wanted_hidden)
                terms_M = terms_of(head(leaf_tH), start, stop)
                leaves = [*([leaf_tH] if wanted_hidden else []), *parameters]
                found = list(torch.autograd.grad((mix_M * terms_M).sum(), leaves))
            if grad_NH is not None:
                grad_NH[start:stop] = found.pop(0)
            for grad, part in zip(sums, found, strict=True):
                grad += part
            total_M += terms_M.detach()
        rounded = [grad.to(p.dtype) for grad, p in zip(sums, parameters, strict=True)]
        ctx.save_for_backward(grad_NH, *rounded)
        ctx.mark_non_differentiable(total_M)
        return (mix_M * total_M).sum(), total_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = [None if g is None else g * grad_loss.to(g.dtype) for g in ctx.saved_tensors]
        return grads[0], None, None, None, None, *grads[1:]


def _of(hidden_NH: Tensor, cuts: Sequence[int]) -> Iterator[tuple[Tensor, int, int]]:
    for start, stop in pairwise(cuts):
        yield hidden_NH[start:stop], start, stop


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
