"""The next-token loss, with logits whole or, for a large vocabulary, never more than a chunk.

Shapes: B = rows, T = predicted positions (in `linear_cross_entropy`: of all rows), T1 = T + 1,
H = hidden size, V = vocabulary.
"""

from collections.abc import Mapping
from typing import Final

import torch
from torch import Tensor, nn

from fp8.batches import IGNORED
from fp8.chunked import chunked_terms
from fp8.distributed import call_inside

LARGE_VOCABULARY: Final = 16_384
"""From here on, logits in fp32 outweigh the activations of a layer of the models we train."""
PLAIN_HEADS: Final = frozenset({"gpt_neox", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3"})
"""Model types whose logits are head(hidden) and nothing else: no soft cap, no factor after it."""
SEPARATING_ATTENTION: Final = ("eager", "sdpa", "flex_attention", "flash_attention")
"""Prefixes of the attention implementations that keep packed documents apart by position_ids."""


def causal_lm_loss(
    model: nn.Module,
    batch: Tensor | Mapping[str, Tensor],
    *,
    chunk_from_vocab: int = LARGE_VOCABULARY,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Mean next-token cross-entropy in nats of a model that answers with `.logits`.

    Args:
        model: a causal language model of transformers, or one with its manners.
        batch: ids [B, T1], or a mapping with input_ids [B, T1] and, if wanted, position_ids,
            attention_mask and labels of the same shape. labels[:, t] is what position t - 1
            predicts (the convention of transformers); IGNORED is not counted.
        chunk_from_vocab: vocabulary from which the loss is taken by `linear_cross_entropy`, for
            model types in PLAIN_HEADS; the others keep their whole logits.
        chunk_tokens: positions whose logits exist at one time.

    Raises: ValueError when position_ids come to an attention that would not keep documents apart.
    """
    fields = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    device = next(model.parameters()).device
    fields = {name: value.to(device) for name, value in fields.items()}
    targets_BT = fields.pop("labels", fields["input_ids"])[:, 1:]
    inputs = {name: value[:, :-1] for name, value in fields.items()}
    if "position_ids" in inputs:
        inputs = keep_apart(model, inputs)
    if head_vocabulary(model) >= chunk_from_vocab:
        loss: Tensor = call_inside(model, _chunked, inputs, targets_BT, chunk_tokens)
        return loss
    logits_BTV = model(**inputs, use_cache=False).logits
    return nn.functional.cross_entropy(
        logits_BTV.float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED
    )


def linear_cross_entropy(
    hidden_TH: Tensor,
    head: nn.Module,
    targets_T: Tensor,
    *,
    chunk_tokens: int = 1024,
) -> Tensor:
    """Equal F.cross_entropy(head(hidden).float(), targets) without a tensor of T x V elements.

    Gradients are computed with the loss, chunk by chunk; see fp8.chunked.

    Args:
        hidden_TH: what the head reads.
        head: any module [t, H] -> [t, V] that treats positions alone: nn.Linear, Float8Linear.
        targets_T: int64 in [0, V), or IGNORED where a position does not count.
        chunk_tokens: positions at one time; a multiple of 128 leaves the tiles in which a
            Float8Linear quantises along the tokens as they were.

    Returns: scalar fp32, the mean over counted targets; NaN when none is, as in torch.
    """
    if hidden_TH.ndim != 2 or targets_T.shape != hidden_TH.shape[:1] or chunk_tokens < 1:
        raise ValueError(
            f"hidden {tuple(hidden_TH.shape)}, targets {tuple(targets_T.shape)} and chunk_tokens "
            f"{chunk_tokens} do not fit; wanted [T, H], [T] and at least 1"
        )
    counted = (targets_T != IGNORED).sum()

    def mean_of(logits_tV: Tensor, start: int, stop: int) -> Tensor:
        total = nn.functional.cross_entropy(
            logits_tV.float(), targets_T[start:stop], ignore_index=IGNORED, reduction="sum"
        )
        return (total / counted)[None]

    positions = len(hidden_TH)
    cuts = [*range(0, max(1, positions), chunk_tokens), positions]
    loss, _ = chunked_terms(hidden_TH, head, mean_of, torch.ones(1, device=hidden_TH.device), cuts)
    return loss


def _chunked(
    model: nn.Module, inputs: Mapping[str, Tensor], targets_BT: Tensor, chunk_tokens: int
) -> Tensor:
    hidden_BTH = model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    return linear_cross_entropy(
        hidden_BTH.flatten(0, 1), head, targets_BT.flatten(), chunk_tokens=chunk_tokens
    )


def head_vocabulary(model: nn.Module) -> int:
    """Size of the vocabulary, or 0 when the head may not be called apart from the model."""
    config = getattr(model, "config", None)
    if getattr(config, "model_type", None) not in PLAIN_HEADS:
        return 0
    return int(config.vocab_size)  # type: ignore[union-attr]


def keep_apart(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prepare packed documents for the model's attention, so that none looks at another.

    transformers reads the documents off position_ids that restart; sdpa, eager and flex then mask
    row by row, the flash kernels only when there is one row, so rows are laid end to end for them.
    """
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", "eager"))
    if not attention.startswith(SEPARATING_ATTENTION) or "attention_mask" in inputs:
        raise ValueError(
            f"a batch with position_ids came to attention {attention!r}"
            f"{' with an attention_mask' if 'attention_mask' in inputs else ''}: documents of a "
            "row would see each other; use sdpa, eager, flex_attention or flash_attention_*, and "
            "no attention_mask"
        )
    if attention.startswith("flash_attention"):
        return {name: value.reshape(1, -1) for name, value in inputs.items()}
    return inputs
