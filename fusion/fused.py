"""A student's log-probabilities at a few ids, and where a batch may be cut into chunks.

All that the fusion losses need of a student at a position are the log-probabilities of the text's
own token and of the ids a target names, and what is left: no [N, V] of log-probabilities is kept.
Shapes: N = positions, V = vocabulary, C = named ids.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def selected_logprobs(
    logits_NV: Tensor, labels_N: Tensor, ids_NC: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probabilities: [N] of the labels, [N, C] of the ids, [N] of all other ids as one.

    The last is summed over the ids that a row does not name. 1 minus the sum of the named would
    lose all digits in fp32 where a confident student leaves less than 1e-6.
    Args: labels_N: int64; need not be among the ids. ids_NC: int64, C at least 1; -1 names
        nothing, and gets 0. A row without any name has all of its mass in the last result.
    Returns: float32, float64 of float64.
    """
    found: tuple[Tensor, Tensor, Tensor] = _Selected.apply(  # type: ignore[no-untyped-call]
        logits_NV, labels_N, ids_NC
    )
    return found


class _Selected(torch.autograd.Function):
    """See `selected_logprobs`. Backward needs one pass over what forward kept, exp(logits)."""

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, labels_N: Tensor, ids_NC: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(logits_NV.dtype, torch.float32)
        top_N1 = logits_NV.amax(-1, keepdim=True).to(wide)
        named_NC = ids_NC >= 0
        # Cells without a name repeat one of their row: everything below may meet an id twice.
        ids_NC = torch.where(named_NC, ids_NC, ids_NC.amax(-1, keepdim=True).clamp_min(0))
        cells_N1C = torch.cat([labels_N[:, None], ids_NC], -1)
        shifted_N1C = logits_NV.gather(-1, cells_N1C).to(wide) - top_N1
        exp_NV = (logits_NV - top_N1).exp_()
        total_N1 = exp_NV.sum(-1, keepdim=True)
        exp_NV.scatter_(-1, ids_NC, 0)
        floor = torch.finfo(wide).tiny
        other_N1 = exp_NV.sum(-1, keepdim=True).clamp_min(floor)
        any_N1 = named_NC.any(-1, keepdim=True)
        log_N1C = shifted_N1C - total_N1.log()
        log_other_N1 = torch.where(any_N1, other_N1.log() - total_N1.log(), 0.0)
        ctx.dtype = logits_NV.dtype
        ctx.save_for_backward(exp_NV, total_N1, other_N1, cells_N1C, shifted_N1C, named_NC, any_N1)
        return log_N1C[:, 0], log_N1C[:, 1:] * named_NC, log_other_N1[:, 0]

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, own_N: Tensor, named_NC: Tensor, other_N: Tensor
    ) -> tuple[Tensor, None, None]:
        exp_NV, total_N1, rest_N1, cells_N1C, shifted_N1C, is_named_NC, any_N1 = ctx.saved_tensors
        grad_N1C = torch.cat([own_N[:, None], named_NC * is_named_NC], -1)
        other_N1 = other_N[:, None] * any_N1
        share_N1 = (grad_N1C.sum(-1, keepdim=True) + other_N1) / total_N1
        grad_NV = exp_NV * (other_N1 / rest_N1 - share_N1)
        # exp_NV is 0 at the named ids: theirs is set, not added, so that an id may come twice.
        grad_NV.scatter_(-1, cells_N1C[:, 1:], -shifted_N1C[:, 1:].exp() * share_N1)
        grad_NV.scatter_add_(-1, cells_N1C, grad_N1C)
        return grad_NV.to(ctx.dtype), None, None


def cut_between(inside_N: Tensor, chunk_tokens: int) -> list[int]:
    """Return 0, the edges of chunks of about `chunk_tokens` positions, and N.

    Args: inside_N: bool, True where a position may not be parted from the one before it.
    Returns: edges as late as they go within chunk_tokens, or, where all of those part what
        belongs together, the first one after it.
    """
    free = (~inside_N).nonzero()[:, 0].tolist()
    edges, stop, last = [0], len(inside_N), 0
    for place in [*free, stop]:
        if place - edges[-1] > chunk_tokens and last > edges[-1]:
            edges.append(last)
        last = place
        if place - edges[-1] >= chunk_tokens:
            edges.append(place)
    return edges if edges[-1] == stop else [*edges, stop]
