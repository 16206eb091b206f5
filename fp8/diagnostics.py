"""Measure what FP8 does to every layer of a model, and say what to worry about.

Tensors are measured as the GEMMs read them: the input [T, K] and the weight [N, K] along K, the
gradient of the output [T, N] along N. T = tokens, K = in_features, N = out_features.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fp8.amax import GRAD_OUTPUT, INPUT
from fp8.convert import layers_to_convert
from fp8.findings import in_words, several, warnings_of
from fp8.fused import Float8SwiGLU
from fp8.linear import Float8Linear, float8_state, load_float8_state
from fp8.measure import ROLES, Role, Row, Tally
from fp8.recipe import BlockScaling, Recipe

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """The measurements of `diagnose`, in the order of the model."""

    rows: tuple[Row, ...]
    recipe: Recipe
    tokens: int
    """Positions that inputs were measured on; 0 when only weights were."""
    remarks: tuple[str, ...] = ()
    """What was not measured, and why."""

    def worst_first(self) -> list[Row]:
        """Return the rows by rising SQNR; those with NaN or infinity come first."""
        return sorted(self.rows, key=lambda row: -math.inf if row.nonfinite else row.sqnr_db)

    def table(self, limit: int | None = None) -> list[dict[str, str]]:
        """Return the worst rows as words, by column."""
        return [in_words(row) for row in self.worst_first()[:limit]]

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON can hold it: None for NaN, and for the SQNR of no noise."""
        return {
            "recipe": self.recipe.name,
            "tokens": self.tokens,
            "rows": [{k: _or_none(v) for k, v in asdict(row).items()} for row in self.rows],
            "warnings": self.warnings(),
            "remarks": list(self.remarks),
        }

    def warnings(self) -> list[str]:
        """Say in plain sentences what to worry about and what to do; empty when all is well."""
        return [text for role in ROLES for text in warnings_of(self.rows, self.recipe, role)]

    def plot(self, path: Path | str) -> None:
        """Draw SQNR, underflow and clipping by layer and role; the ending of path is the format."""
        from fp8.plots import plot_rows  # matplotlib takes a second to load

        plot_rows(self.rows, self.recipe.name, Path(path))


def diagnose(
    model: nn.Module,
    batch: Any = None,
    loss_fn: LossFunction | None = None,
    recipe: Recipe | None = None,
) -> Diagnosis:
    """Measure what FP8 does to the tensors of a model. The model, its gradients and mode stay.

    Args:
        model: converted, or plain: then the layers that conversion would take are measured.
        batch: what loss_fn takes; None measures the weights alone. All gradients are in memory
            for a moment, as in training.
        loss_fn: (model, batch) -> scalar; without one, batch is token ids [B, T], or the keyword
            arguments of a Hugging Face model with labels among them.
        recipe: how to quantise; without one, as the layers do, and BlockScaling() for plain ones.

    Returns: one row per layer and role. Not measured: the random Hadamard transform, and the
        second copy of inputs and gradients, along the other axis. Delayed scaling is measured
        with the layer's history, and without one as if the tensor had scaled itself.
    Raises: ValueError when there is no layer to measure, or no loss to start backward from.
    """
    layers = _layers(model, recipe or BlockScaling())
    recipes = {name: _recipe_of(layer, recipe) for name, layer in layers.items()}
    tallies: dict[tuple[str, Role], Tally] = {}
    remarks = []
    with _kept_as_it_is(model), _hooked(model, layers, recipes, tallies):
        for name, layer in layers.items():
            tallies[name, "weight"] = Tally(recipes[name].weight)
            tallies[name, "weight"].add(layer.weight)
        if batch is None:
            remarks.append("weights only: there was no batch to take inputs and gradients from")
        else:
            _forward_and_backward(model, batch, loss_fn or _loss_of)
    rows = tuple(
        tallies[name, role].row(name, role)
        for name in layers
        for role in ROLES
        if (name, role) in tallies
    )
    if batch is not None:
        remarks += _unseen(layers, tallies)
    tokens = max(
        (r.values // layers[r.layer].in_features for r in rows if r.role == "input"), default=0
    )
    return Diagnosis(
        rows=rows, recipe=next(iter(recipes.values())), tokens=tokens, remarks=tuple(remarks)
    )


def _layers(model: nn.Module, recipe: Recipe) -> dict[str, nn.Linear]:
    """Return the FP8 layers by name, or those that conversion would make so; each once."""
    found: dict[str, nn.Linear] = {
        name: m for name, m in model.named_modules() if isinstance(m, Float8Linear)
    }
    if not found:
        plain = layers_to_convert(model, recipe)
        first = {id(layer): name for name, layer in reversed(plain.items())}
        found = {name: layer for name, layer in plain.items() if first[id(layer)] == name}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no FP8 layer and none that could become one; give a model "
            "with nn.Linear layers beside its output head"
        )
    return found


def _recipe_of(layer: nn.Module, wanted: Recipe | None) -> Recipe:
    if wanted is not None:
        return wanted
    return layer.recipe if isinstance(layer, Float8Linear) else BlockScaling()


@contextmanager
def _kept_as_it_is(model: nn.Module) -> Iterator[None]:
    """Put back afterwards what a forward pass changes: buffers, delayed scales, torch's RNG."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    history = {name: tensor.clone() for name, tensor in float8_state(model).items()}
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices, key=str), device_type="cuda"):
        torch.manual_seed(0)
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            load_float8_state(model, history)


@contextmanager
def _hooked(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    recipes: Mapping[str, Recipe],
    tallies: dict[tuple[str, Role], Tally],
) -> Iterator[None]:
    """Have each layer's input and output gradient counted as they pass."""

    def watch(name: str, recipe: Recipe) -> Callable[..., None]:
        def count(role: Role, x: Tensor, layer: nn.Module) -> None:
            spec = recipe.input if role == "input" else recipe.grad_output
            amax = _delayed_amax(layer, role, x) if recipe.history else None
            tallies.setdefault((name, role), Tally(spec)).add(x.detach().flatten(0, -2), amax)

        # After the forward, because only then a history has its newest page.
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            count("input", args[0] if args else next(iter(kwargs.values())), layer)
            if output.requires_grad:
                output.register_hook(lambda grad: count("grad_output", grad, layer))  # type: ignore[no-untyped-call]

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = watch(name, recipes[name])
            handle = layer.register_forward_hook(hook, with_kwargs=True)
            hooks.callback(handle.remove)
        for block in model.modules():
            if isinstance(block, Float8SwiGLU):  # which does not call its layers
                block.forward = block.by_layers  # type: ignore[method-assign]
                hooks.callback(delattr, block, "forward")
        yield


def _delayed_amax(layer: nn.Module, role: Role, x: Tensor) -> Tensor | None:
    history = layer.amax if isinstance(layer, Float8Linear) else None
    if history is None:
        return None
    return history.scale_by(INPUT if role == "input" else GRAD_OUTPUT, x, record=False)


def _forward_and_backward(model: nn.Module, batch: Any, loss_fn: LossFunction) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        loss = loss_fn(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(f"loss_fn gave {type(loss).__name__}; wanted a scalar tensor")
        if parameters and loss.requires_grad:
            # Not backward(): that would add to the gradients that the model holds.
            torch.autograd.grad(loss.squeeze(), parameters, allow_unused=True)


def _loss_of(model: nn.Module, batch: Any) -> Tensor:
    device = next(model.parameters()).device
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch, "labels": batch}
    if not isinstance(batch, Mapping):
        raise ValueError(f"batch is a {type(batch).__name__}; wanted token ids, or give loss_fn")
    inputs = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
    loss = getattr(model(**({"use_cache": False} | inputs)), "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError("the model gave no loss for this batch; put labels in, or give loss_fn")
    return loss


def _unseen(
    layers: Mapping[str, nn.Linear], tallies: Mapping[tuple[str, Role], Tally]
) -> Iterator[str]:
    for role in ("input", "grad_output"):
        unseen = [name for name in layers if (name, role) not in tallies]
        if unseen:
            yield f"{role} of {several(unseen)} not measured: the batch did not reach it"


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
