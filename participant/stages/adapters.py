"""Low-rank adapters: a stage that trains two thin matrices beside each linear layer, not the layer.

    y = W x + scale * B (A x),    A [R, K] drawn at random, B [N, R] zero at the beginning
Less memory for gradients and moments, and less that is forgotten. W keeps its precision (FP8, say)
and stands still; the thin ones are in the precision of the weights. Folded in, the model is an
ordinary one again. Source: LoRA (arXiv 2106.09685).
Shapes: K = in_features, N = out_features, R = rank.
"""

import math

import torch
from torch import Tensor, nn

from fp8.convert import skip_embeddings_and_head


class LowRank(nn.Module):
    """A frozen linear layer and what is learned beside it."""

    def __init__(self, layer: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.down = nn.Parameter(layer.weight.new_empty(rank, layer.in_features))
        self.up = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's own answer and the adapter's, in the dtype of x."""
        y: Tensor = self.layer(x)
        low = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return y + self.scale * low.to(y.dtype)

    @torch.no_grad()
    def folded(self) -> nn.Linear:
        """The layer with what was learned added to its weight."""
        self.layer.weight += self.scale * (self.up @ self.down)
        return self.layer


def attach(model: nn.Module, rank: int, *, scale: float, seed: int) -> int:
    """Put an adapter on every linear layer but the head, and freeze all else; return how many.

    The model answers as before until something is learned.
    """
    model.requires_grad_(False)
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and skip_embeddings_and_head(module, name)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, layer in found.items():
            _put(model, name, LowRank(layer, rank, scale))
    return len(found)


def fold(model: nn.Module) -> int:
    """Make the model an ordinary one again, all of it trainable; return how many it had."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, LowRank)}
    for name, adapter in found.items():
        _put(model, name, adapter.folded())
    model.requires_grad_(True)
    return len(found)


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
