"""Turn a model's linear layers into low-precision layers, and say which were left and why."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from torch import nn

from fp8.fused import Float8SwiGLU, FusedRMSNorm, Keep, is_rms_norm, why_not_fused
from fp8.linear import Float8Linear
from fp8.recipe import BlockScaling, Recipe

HEAD_NAMES: Final = frozenset({"lm_head", "embed_out"})

ModuleFilter = Callable[[nn.Module, str], bool]


@dataclass(frozen=True, slots=True)
class ConversionReport:
    """What `convert_to_float8_training` did, by module name."""

    converted: tuple[str, ...]
    skipped: Mapping[str, str]
    """Every other module that holds a matrix, with the reason."""
    backends: Mapping[str, tuple[str, str]]
    """For each converted layer its backend, and why no faster one: '' if the fastest runs it."""
    fused: tuple[str, ...] = ()
    """The blocks whose SwiGLU keeps 8-bit activations."""

    def __str__(self) -> str:
        """Say it in lines, the same reasons together."""
        lines = [f"{len(self.converted)} layers converted, {len(self.skipped)} left"]
        lines += [f"  runs on {_say(*key)}: {n}" for key, n in _count(self.backends.values())]
        lines += [f"  left, {reason}: {n}" for reason, n in _count(self.skipped.values())]
        if self.fused:
            lines.append(f"  SwiGLU blocks with 8-bit activations: {len(self.fused)}")
        return "\n".join(lines)


def skip_embeddings_and_head(module: nn.Module, fqn: str) -> bool:
    """Convert every linear layer but the output head: InfiR2 keeps head and embeddings as is."""
    return isinstance(module, nn.Linear) and fqn.rpartition(".")[2] not in HEAD_NAMES


def convert_to_float8_training(
    model: nn.Module,
    recipe: Recipe | None = None,
    module_filter_fn: ModuleFilter = skip_embeddings_and_head,
    *,
    swiglu: Literal["plain"] | Keep = "plain",
    fuse_norms: bool = False,
    head: Recipe | None = None,
) -> ConversionReport:
    """Replace linear layers by `Float8Linear` in place; parameters and their names stay.

    Args:
        model: any module tree; a layer that occurs in several places stays one layer.
        recipe: how to quantise; the default is BlockScaling().
        module_filter_fn: (module, name) -> whether to convert it.
        swiglu: what the MLPs of Llama, Mistral and Qwen keep for backward: "plain" all that
            autograd wants; "float8" gate and up in 8 bits; "recompute" those alone, and the
            product anew in backward.
        fuse_norms: let their RMSNorms keep one copy of their input, not three.
        head: a recipe for the output head too; a head tied to the embedding shares its weight.

    Returns: names converted, and names left with the reason; nothing is left silently.
    Raises: ValueError for a weight with NaN or infinity; UnsupportedBackendError for a backend
        that was named and cannot run a layer. The model is then as it was.
    """
    recipe = recipe or BlockScaling()
    plan, skipped = _plan(model, recipe, module_filter_fn, head)
    made: dict[nn.Linear, Float8Linear] = {}
    for fqn, (linear, own) in plan.items():
        if linear not in made:
            _check_weight(fqn, linear)
            made[linear] = Float8Linear.from_float(linear, own)
    for fqn, (linear, _) in plan.items():
        _put(model, fqn, made[linear])
    fused = () if swiglu == "plain" else _fuse(model, swiglu, skipped)
    if fuse_norms:
        fuse_rms_norms(model)
    return ConversionReport(
        tuple(plan),
        MappingProxyType(skipped),
        MappingProxyType(
            {fqn: (made[m].backend.name, made[m].fallback) for fqn, (m, _) in plan.items()}
        ),
        fused,
    )


def revert_to_float(model: nn.Module) -> int:
    """Replace every low-precision layer by the plain one, in place. Returns how many."""
    plain: dict[nn.Module, nn.Module] = {}
    for fqn, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Float8SwiGLU | FusedRMSNorm):
            _put(model, fqn, module.original)
    for fqn, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, Float8Linear):
            _put(model, fqn, plain.setdefault(module, module.to_float()))
    return len(plain)


def fuse_rms_norms(model: nn.Module) -> int:
    """Replace the RMSNorms of Llama, Mistral and Qwen by leaner ones. Returns how many."""
    reader = next((m for m in model.modules() if isinstance(m, Float8Linear)), None)
    norms = [(fqn, m) for fqn, m in model.named_modules() if is_rms_norm(m)]
    for fqn, module in norms:
        _put(model, fqn, FusedRMSNorm(module, reader))
    return len(norms)


def layers_to_convert(model: nn.Module, recipe: Recipe) -> dict[str, nn.Linear]:
    """Return the layers that conversion would replace, by name; those already converted too."""
    plan, _ = _plan(model, recipe, skip_embeddings_and_head, None)
    done = {fqn: m for fqn, m in model.named_modules() if isinstance(m, Float8Linear)}
    return {fqn: linear for fqn, (linear, _) in plan.items()} | done


def _plan(
    model: nn.Module, recipe: Recipe, module_filter_fn: ModuleFilter, head: Recipe | None
) -> tuple[dict[str, tuple[nn.Linear, Recipe]], dict[str, str]]:
    """Decide for every module that holds a matrix, without touching any."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    last_blocks = tuple(_last_blocks(model, recipe.keep_last))
    plan: dict[str, tuple[nn.Linear, Recipe]] = {}
    skipped: dict[str, str] = {}
    for fqn, module in model.named_modules(remove_duplicate=False):
        if not _holds_matrix(module):
            continue
        if head is not None and type(module) is nn.Linear and _is_head(fqn):
            plan[fqn] = (module, head)
            continue
        reason = _reason_to_skip(module, fqn, module_filter_fn, embeddings)
        if reason is None and fqn.startswith(last_blocks):
            reason = f"one of the last blocks, which {recipe.name} leaves in high precision"
        if reason is not None:
            skipped[fqn] = reason
            continue
        assert isinstance(module, nn.Linear)
        plan[fqn] = (module, recipe)
    return plan, skipped


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


def _last_blocks(model: nn.Module, share: float) -> Iterator[str]:
    """Name the blocks to leave alone, each with the dot that ends its name."""
    lists = {fqn: m for fqn, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if share and lists:
        fqn = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
        count = len(lists[fqn])
        for index in range(count - math.ceil(share * count), count):
            yield f"{fqn}.{index}."


def _check_weight(fqn: str, linear: nn.Linear) -> None:
    if linear.weight.is_meta:
        return
    odd = int((~linear.weight.detach().isfinite()).sum())
    if odd:
        raise ValueError(
            f"the weight of {fqn} holds {odd} values that are NaN or infinite; low precision "
            "would spread them over whole blocks: load a sound checkpoint"
        )


def _fuse(model: nn.Module, keep: Keep, skipped: dict[str, str]) -> tuple[str, ...]:
    fused: list[str] = []
    for fqn, module in list(model.named_modules()):
        why_not = why_not_fused(module)
        if why_not is None:
            _put(model, fqn, Float8SwiGLU(module, keep))
            fused.append(fqn)
        elif why_not:
            skipped[fqn] = f"its SwiGLU keeps plain activations: {why_not}"
    return tuple(fused)


def _put(model: nn.Module, fqn: str, module: nn.Module) -> None:
    parent, _, name = fqn.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _is_head(fqn: str) -> bool:
    return fqn.rpartition(".")[2] in HEAD_NAMES


def _holds_matrix(module: nn.Module) -> bool:
    return any(p.ndim >= 2 for p in module.parameters(recurse=False))


def _count(items: Iterable[Hashable]) -> list[tuple[Any, int]]:
    return Counter(items).most_common()


def _say(backend: str, why: str) -> str:
    return f"{backend} ({why})" if why else backend
