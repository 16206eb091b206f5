"""Where a training step went wrong: the first module or gradient that was not finite."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fp8.checkpoint import Position
from fp8.distributed import Ranks, settle
from fp8.optim_state import local_tensor


def first_nonfinite(
    model: nn.Module, batches: list[Any], loss_fn: Callable[[nn.Module, Any], object]
) -> str:
    """Name the module whose output, or else the parameter whose gradient, was not finite first."""
    found: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not bool(output.isfinite().all()):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            for batch in batches:
                loss_fn(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    settle(model)
    if found:
        return f"the output of {found[0]}"
    # Backward runs from the head to the embedding: the last parameter is the first one reached.
    for name, p in reversed(list(model.named_parameters())):
        if p.grad is not None and not bool(local_tensor(p.grad).isfinite().all()):
            return f"the gradient of {name}"
    return ""


def report_skip(
    model: nn.Module,
    pieces: list[tuple[Any, float]],
    loss_fn: Callable[[nn.Module, Any], object],
    loss: float,
    at: Position,
    ranks: Ranks,
) -> None:
    """Warn that a step is skipped, and say where it went wrong; every rank must call it."""
    places = ranks.gather(first_nonfinite(model, [piece for piece, _ in pieces], loss_fn))
    told = sorted(filter(None, places), key=lambda place: place.startswith("the gradient"))
    where = (
        told[0] if told else "the loss itself; all modules' outputs and all gradients are finite"
    )
    if ranks.first:
        warnings.warn(
            f"step {at.step} is skipped: loss {loss:g}; first not finite: {where}",
            RuntimeWarning,
            stacklevel=4,
        )
