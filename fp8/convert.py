"""Turn a model's linear layers into FP8 layers, and say which were left and why."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from torch import nn

from fp8.linear import Float8Linear
from fp8.recipe import BlockScaling

HEAD_NAMES: Final = frozenset({"lm_head", "embed_out"})

ModuleFilter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What `convert_to_float8_training` did, by module name."""

    converted: tuple[str, ...]
    skipped: Mapping[str, str]
    """Every other module that holds a matrix, with the reason."""


def skip_embeddings_and_head(module: nn.Module, fqn: str) -> bool:
    """Convert every linear layer but the output head: InfiR2 keeps head and embeddings as is."""
    return isinstance(module, nn.Linear) and fqn.rpartition(".")[2] not in HEAD_NAMES


def convert_to_float8_training(
    model: nn.Module,
    recipe: BlockScaling | None = None,
    module_filter_fn: ModuleFilter = skip_embeddings_and_head,
) -> ConversionReport:
    """Replace linear layers by `Float8Linear` in place; parameters and their names stay.

    Args:
        model: any module tree; a layer that occurs in several places stays one layer.
        recipe: how to quantise; the default is BlockScaling().
        module_filter_fn: (module, name) -> whether to convert it.

    Returns: names converted, and names left with the reason; nothing is left silently.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    replaced: dict[nn.Module, Float8Linear] = {}
    converted: list[str] = []
    skipped: dict[str, str] = {}
    for fqn, module in list(model.named_modules(remove_duplicate=False)):
        if not _holds_matrix(module):
            continue
        reason = _reason_to_skip(module, fqn, module_filter_fn, embeddings)
        if reason is not None:
            skipped[fqn] = reason
            continue
        assert isinstance(module, nn.Linear)
        if module not in replaced:
            replaced[module] = Float8Linear.from_float(module, recipe)
        parent, _, name = fqn.rpartition(".")
        setattr(model.get_submodule(parent), name, replaced[module])
        converted.append(fqn)
    return ConversionReport(tuple(converted), MappingProxyType(skipped))


def _reason_to_skip(
    module: nn.Module, fqn: str, module_filter_fn: ModuleFilter, embeddings: set[int]
) -> str | None:
    if isinstance(module, Float8Linear):
        return "already FP8"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if type(module) is not nn.Linear:
        return f"not a plain nn.Linear: {type(module).__name__}"
    if id(module.weight) in embeddings:
        return "its weight is tied to an embedding"
    if not module_filter_fn(module, fqn):
        return f"left out by {getattr(module_filter_fn, '__name__', 'module_filter_fn')}"
    if fqn == "":
        return "the model is itself a linear layer: there is no parent to hold another in"
    return None


def _holds_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters(recurse=False))
