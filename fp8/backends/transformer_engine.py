"""NVIDIA's Transformer Engine as a backend: taken only by name, found only on CUDA.

It brings a linear layer of its own, so it is no `Backend`: the layer hands its whole forward over.
The engine's layer shares parameters with ours and is no submodule of it: state_dicts hold no
`_extra_state`. So the amax history of delayed scaling is not in a checkpoint, and starts anew.
Not one line of the engine ran where this was written (it needs CUDA): the mapping of recipes is
tested against a stand-in, the rest follows the engine's sources, version 2.4 and later.
"""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fp8.recipe import TENSOR, QuantSpec, Recipe

_TOKENS: Final = 128  # rows that every kernel of the engine takes a multiple of


class _Engine(NamedTuple):
    torch: Any
    """transformer_engine.pytorch."""
    recipe: Any
    """transformer_engine.common.recipe."""


class _Row(NamedTuple):
    """How one of our recipes is said in the engine's words."""

    make: Callable[[Recipe, Any], Any]
    """(our recipe, the engine's module of recipes) -> the engine's recipe."""
    check: str
    """The engine's function that tells whether the GPU can."""
    multiple: int
    """What both feature sizes must divide by."""


class TransformerEngine:
    """Linear layers of Transformer Engine that share parameters with ours."""

    name = "transformer_engine"

    def __init__(self) -> None:
        self._layers: WeakKeyDictionary[nn.Linear, Any] = WeakKeyDictionary()

    def refusal(
        self, recipe: Recipe, in_features: int, out_features: int, device: torch.device
    ) -> str | None:
        """Say why the engine cannot run such a layer; None when it can."""
        if device.type != "cuda":
            return f"it needs a CUDA device; the layer is on {device.type}"
        why_not = recipe_refusal(recipe)
        if why_not is not None:
            return why_not
        row = _ROWS[recipe.name]
        if in_features % row.multiple or out_features % row.multiple:
            return (
                f"features are {in_features} and {out_features}; the engine's {recipe.name} "
                f"kernels need multiples of {row.multiple}"
            )
        engine = _engine()
        return engine if isinstance(engine, str) else _gpu_refusal(engine, row)

    def linear(self, layer: nn.Linear, x: Tensor, recipe: Recipe) -> Tensor:
        """Return x @ weight.T + bias [..., N] by the engine, with its own backward."""
        engine = _engine()
        assert not isinstance(engine, str)  # refusal() was asked first
        x_TK = x.reshape(-1, layer.in_features)
        tokens = x_TK.shape[0]
        # Zeros change no amax, and their gradients are cut off.
        filled = pad(x_TK, (0, 0, 0, -tokens % _TOKENS))
        theirs = _ROWS[recipe.name].make(recipe, engine.recipe)
        with _mixed_dtypes(x, layer.weight), _autocast(engine, theirs):
            y_TN: Tensor = self._twin(engine, layer)(filled)
        return y_TN[:tokens].reshape(*x.shape[:-1], layer.out_features)

    def _twin(self, engine: _Engine, layer: nn.Linear) -> Any:
        """Return the engine's layer for ours, with the very parameters that ours has now."""
        twin = self._layers.get(layer)
        if twin is None:
            twin = engine.torch.Linear(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                params_dtype=layer.weight.dtype,
                device="meta",
            )
            self._layers[layer] = twin
        if twin.weight is not layer.weight:
            twin.weight = layer.weight
        if layer.bias is not None and twin.bias is not layer.bias:
            twin.bias = layer.bias
        return twin.train(layer.training)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TransformerEngine":
        """Be one and the same in copies of a model: it holds no state of theirs."""
        return self

    def __reduce__(self) -> tuple[type["TransformerEngine"], tuple[()]]:
        """Leave the engine's layers out of pickles."""
        return TransformerEngine, ()


def recipe_refusal(recipe: Recipe) -> str | None:
    """Say why the engine has no such recipe; None when it has."""
    if recipe.name not in _ROWS:
        known = ", ".join(_ROWS)
        return f"the engine has no recipe like {recipe.name}; it has {known}"
    if recipe.gemm != "bfloat16":
        return "the engine rounds every result to the dtype of the activations; gemm is float32"
    if recipe.name == "block" and recipe.input.block != (1, 128):
        return f"the engine's blocks are 1 x 128; the recipe's are {recipe.input.block}"
    if recipe.name == "nvfp4" and recipe.input.outer != TENSOR:
        return "the engine's second-level scale is per tensor; use NVFP4(outer='tensor')"
    if recipe.name == "delayed" and _is_power_of_two(recipe.input):
        return "the engine's delayed scales are fp32; use DelayedScaling(scale_format='fp32')"
    return None


@functools.cache
def _engine() -> _Engine | str:
    """Import the engine, or say why not. Without its core it raises RuntimeError and worse."""
    if importlib.util.find_spec("transformer_engine") is None:
        return "Transformer Engine is not installed; pip install 'cofuse[te]' on the GPU machine"
    try:
        return _Engine(
            importlib.import_module("transformer_engine.pytorch"),
            importlib.import_module("transformer_engine.common.recipe"),
        )
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
        return f"Transformer Engine cannot be imported: {error}"


def _gpu_refusal(engine: _Engine, row: _Row) -> str | None:
    check = getattr(engine.torch, row.check, None)
    if check is None:
        return f"this Transformer Engine has no {row.check}; upgrade it"
    available, reason = check(return_reason=True)
    return None if available else f"Transformer Engine says: {reason}"


def _autocast(engine: _Engine, theirs: Any) -> AbstractContextManager[Any]:
    if hasattr(engine.torch, "autocast"):
        new: AbstractContextManager[Any] = engine.torch.autocast(enabled=True, recipe=theirs)
        return new
    old: AbstractContextManager[Any] = engine.torch.fp8_autocast(enabled=True, fp8_recipe=theirs)
    return old


def _mixed_dtypes(x: Tensor, weight: Tensor) -> AbstractContextManager[Any]:
    """Outside torch's autocast the engine wants input and weight in one dtype."""
    if x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, dtype=x.dtype)


def _is_power_of_two(spec: QuantSpec) -> bool:
    return spec.scale_format == "power_of_two"


def _with_scales(theirs: Any, recipe: Recipe, recipes: Any) -> Any:
    """Set the kind of scales. The engine takes it from the environment, when it is imported."""
    sides = {"fwd_inp": recipe.input, "fwd_weight": recipe.weight, "bwd_grad": recipe.grad_output}
    for side, spec in sides.items():
        params = recipes.QParams(power_2_scale=_is_power_of_two(spec), amax_epsilon=0.0)
        setattr(theirs, f"fp8_quant_{side}", params)
    return theirs


def _block(recipe: Recipe, recipes: Any) -> Any:
    return _with_scales(recipes.Float8BlockScaling(), recipe, recipes)


def _current(recipe: Recipe, recipes: Any) -> Any:
    theirs = recipes.Float8CurrentScaling(fp8_format=recipes.Format.HYBRID)
    return _with_scales(theirs, recipe, recipes)


def _delayed(recipe: Recipe, recipes: Any) -> Any:
    return recipes.DelayedScaling(
        fp8_format=recipes.Format.HYBRID,
        amax_history_len=recipe.history,
        amax_compute_algo="max",
    )


def _mxfp8(recipe: Recipe, recipes: Any) -> Any:
    return recipes.MXFP8BlockScaling(fp8_format=recipes.Format.E4M3)


def _nvfp4(recipe: Recipe, recipes: Any) -> Any:
    return recipes.NVFP4BlockScaling(
        disable_rht=not recipe.hadamard,
        disable_stochastic_rounding=not recipe.grad_output.stochastic,
        disable_2d_quantization=recipe.weight.block[0] == 1,
    )


_ROWS: Final[dict[str, _Row]] = {
    "block": _Row(_block, "is_fp8_block_scaling_available", 128),
    "current": _Row(_current, "is_fp8_available", 16),
    "delayed": _Row(_delayed, "is_fp8_available", 16),
    "mxfp8": _Row(_mxfp8, "is_mxfp8_available", 32),
    "nvfp4": _Row(_nvfp4, "is_nvfp4_available", 32),
}
