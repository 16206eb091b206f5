"""Rounds over weights, at the participants: what keeps a local run near the pivot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fp8.train import Loss
from fusion.merge_settings import MergeError


def proximal(loss_fn: Loss, reference: Mapping[str, Tensor], mu: float) -> Loss:
    """Add mu/2 * |parameters - reference|^2 to a loss, so that a participant stays near the pivot.

    Each parameter counts once, tied ones too. The term is the same for every piece of a batch, so
    the mean of the pieces by their tokens is the loss of the batch, as `fp8.train` wants it.
    A model must be whole in this process: the reference is not sharded with it.

    Args:
        loss_fn: a mean over tokens.
        reference: the pivot's parameters by name (named_parameters); copied.
        mu: at least 0; at 0 the loss is loss_fn's, and the term is not computed.
    Raises: MergeError for another mu; when called, for parameters the reference does not have.
    Source: FedProx (arXiv 1812.06127).
    """
    if not 0 <= mu < math.inf:
        raise MergeError(f"mu is {mu}; wanted at least 0, and finite")
    if mu == 0:
        return loss_fn
    fixed = {name: tensor.detach().clone() for name, tensor in reference.items()}

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, Mapping[str, float]]:
        found = loss_fn(model, batch)
        value, metrics = (found, {}) if isinstance(found, Tensor) else found
        term = torch.zeros((), dtype=torch.float32, device=value.device)
        for name, parameter in model.named_parameters():
            if name not in fixed:
                raise MergeError(f"the proximal reference has no {name}; take it from this model")
            if parameter.requires_grad:
                term = term + (parameter - fixed[name].to(parameter)).float().square().sum()
        term = mu / 2 * term
        return value + term, {**metrics, "proximal": float(term.detach())}

    return loss
