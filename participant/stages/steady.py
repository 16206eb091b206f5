"""Attention whose sums come out the same whatever is beside a token: for rollouts on a CPU.

FP8 layers treat each token alone, but attention adds up in an order that hangs on the batch, its
padding and the cache. The last bits that this changes are few, yet now and then one of them moves
an activation over the edge between two FP8 codes, a step of 6 %: after some training, rollout and
trainer were 0.1 nats apart. Added up in 64 bits and rounded once, the order does not show. A GPU
has no time for this; there the weights of `grpo` take up what is left.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME: Final = "sdpa_float64"
"""Begins as the attention it is: masks are made, and documents told apart, as for sdpa."""


@contextmanager
def steady_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model on a CPU that attends by sdpa do so in 64 bits; any other is left as it is."""
    before = model.config._attn_implementation
    if before != "sdpa" or next(model.parameters()).device.type != "cpu":
        yield
        return
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **how: Any,
) -> tuple[Tensor, None]:
    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.double()
    out, _ = sdpa_attention_forward(
        module, query.double(), key.double(), value.double(), mask, **how
    )
    return out.to(query.dtype), None


AttentionInterface.register(NAME, _attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
