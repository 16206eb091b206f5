"""Choose who does the arithmetic, and say why not another."""

from typing import Final

import torch

from fp8.backends.base import Backend, UnsupportedBackendError
from fp8.backends.emulated import Emulated
from fp8.backends.scaled_mm import ScaledMM
from fp8.backends.transformer_engine import TransformerEngine
from fp8.recipe import Recipe

# The fastest first. Transformer Engine brings a layer of its own, and is taken only by name.
BACKENDS: Final[tuple[Backend, ...]] = (ScaledMM(), Emulated())
_ALL: Final[tuple[Backend | TransformerEngine, ...]] = (*BACKENDS, TransformerEngine())
BY_NAME: Final = {backend.name: backend for backend in _ALL}


def select(
    recipe: Recipe, in_features: int, out_features: int, device: torch.device
) -> tuple[Backend | TransformerEngine, str]:
    """Return the backend for a layer, and why no faster one was taken ('' if there is none).

    Raises: UnsupportedBackendError when recipe.backend names one that cannot.
    """
    if recipe.backend != "auto":
        named = BY_NAME[recipe.backend]
        why_not = named.refusal(recipe, in_features, out_features, device)
        if why_not is not None:
            raise UnsupportedBackendError(
                f"backend {named.name} cannot run the {recipe.name} recipe for a "
                f"{in_features} x {out_features} layer on {device}: {why_not}; "
                "use backend='auto' or 'emulated'"
            )
        return named, ""
    reasons: list[str] = []
    for backend in BACKENDS:
        why_not = backend.refusal(recipe, in_features, out_features, device)
        if why_not is None:
            return backend, "; ".join(reasons)
        reasons.append(f"{backend.name}: {why_not}")
    raise AssertionError("the emulated backend refuses nothing")


def available(
    recipe: Recipe, device: torch.device, in_features: int = 1024, out_features: int = 1024
) -> list[tuple[str, str | None]]:
    """List every backend with the reason why it cannot run the recipe here; None if it can."""
    return [
        (name, backend.refusal(recipe, in_features, out_features, device))
        for name, backend in BY_NAME.items()
    ]
