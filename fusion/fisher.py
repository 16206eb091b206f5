"""Diagonal Fisher information: how sharply a model's loss depends on each of its parameters.

Made where the text is; it is shaped as the weights, and method `fisher` of fusion.merge reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fp8.batches import count_tokens, packed_batches, part_of
from fp8.train import Loss, causal_lm_loss
from fusion.merge_settings import MergeError
from fusion.models import encode_documents

MEASURED_SEQUENCES: Final = 128
"""How many windows of a prompt set Fisher information is measured on: a backward pass each."""


def fisher_on_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    seq_len: int,
    seed: int,
) -> dict[str, NDArray[np.float32]]:
    """Return diagonal_fisher() on MEASURED_SEQUENCES windows of the texts, drawn by the seed.

    Args: seq_len: tokens of a window.
    Raises: MergeError when the texts fill no window, or a gradient is not finite.
    """
    tokens = encode_documents(tokenizer, texts)
    if len(tokens) <= seq_len:
        raise MergeError(
            f"found {len(tokens)} tokens of text to measure Fisher information on, wanted more "
            f"than seq_len, {seq_len}: give a larger prompt set, or a smaller training.seq_len"
        )
    rows = packed_batches(tokens, batch_size=1, seq_len=seq_len, seed=seed)
    windows = min(MEASURED_SEQUENCES, (len(tokens) - 1) // seq_len)
    return diagonal_fisher(model, map(rows, range(windows)), causal_lm_loss)


def diagonal_fisher(
    model: nn.Module, batches: Iterable[Any], loss: Loss
) -> dict[str, NDArray[np.float32]]:
    """Return the mean over sequences of the squared gradient, by parameter name.

    The empirical Fisher information: gradients at the text's own tokens, where the exact one draws
    tokens from the model. A sequence's gradient is that of its mean loss per token, so sources
    whose sequences differ in length are comparable; long and short ones weigh alike. The model is
    run in eval mode, and its mode, gradients and weights are afterwards as they were.

    Args:
        model: its parameters with requires_grad are measured; others get zeros.
        batches: as `fp8.train` takes them, rows first; a row is a sequence.
        loss: a mean over the tokens of a batch.
    Returns: fp32, at least 0, shaped as the parameters; tied ones once.
    Raises: MergeError when there is no sequence, or a gradient is not finite.
    Source: Fisher merging (arXiv 2111.09832).
    """
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    sums = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in parameters.items()}
    was_training, sequences = model.training, 0
    model.eval()
    try:
        for batch in batches:
            rows = _rows(batch)
            for row in range(rows):
                piece = part_of(batch, row, rows)
                if count_tokens(piece) == 0:
                    continue  # its mean loss would be 0 / 0
                sequences += 1
                for name, grad in _gradients(model, piece, loss, parameters).items():
                    sums[name] += grad.float().square()
    finally:
        model.train(was_training)
    if not sequences:
        raise MergeError("there is no sequence to measure Fisher information on; give some text")
    found = {
        name: (sums[name] / sequences if name in sums else torch.zeros_like(p)).float()
        for name, p in model.named_parameters()
    }
    if bad := [name for name, value in found.items() if not bool(value.isfinite().all())]:
        raise MergeError(f"the gradient of {bad[0]} is not finite; check the model and the text")
    return {name: value.detach().cpu().numpy() for name, value in found.items()}


def _gradients(
    model: nn.Module, piece: Any, loss: Loss, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    with torch.enable_grad():
        value = loss(model, piece)
        scalar = value if isinstance(value, Tensor) else value[0]
        grads = torch.autograd.grad(scalar, list(parameters.values()), allow_unused=True)
    return {n: g for n, g in zip(parameters, grads, strict=True) if g is not None}


def _rows(batch: Any) -> int:
    """Sequences of a batch."""
    if isinstance(batch, Tensor):
        return len(batch)
    if hasattr(batch, "values"):
        return len(next(iter(batch.values())))
    return len(batch.inputs)
