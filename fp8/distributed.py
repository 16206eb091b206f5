"""One model on several processes: FSDP2, when torchrun started the program.

Every process (rank) holds a slice of each parameter, its gradient and its moments, gathers a
layer when it is needed, and computes its share of every batch. Whatever decides where a run goes
(is this step finite, shall we stop) is decided by all ranks together, or they would wait for each
other for ever. With one process everything here does nothing.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

P = ParamSpec("P")
R = TypeVar("R")
_METHOD: Final = "_float8_inside"


@dataclass(frozen=True, slots=True)
class Ranks:
    """The processes of this run, as one of them sees them."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this process talks to the others."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Return whether the flag is up on any rank; the answer is the same on all."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag))).item())

    def gather(self, value: R) -> list[R]:
        """Return every rank's value, in the order of the ranks. For small things."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, element by element; NaN anywhere is NaN everywhere."""
        if self.size == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()


def join() -> Ranks:
    """Join the other processes of this run: those torchrun started, else none.

    torchrun is known by RANK and WORLD_SIZE; the processes talk over NCCL on GPUs and over gloo
    on CPUs. A group that the program has made already is used as it is.
    """
    gpu = torch.cuda.is_available()
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return Ranks()
        if gpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def shard(model: nn.Module, ranks: Ranks) -> None:
    """Shard `model` in place over the ranks, layer by layer; nothing if there is one, or it is.

    The model must be the same on every rank, and FP8 layers must be in it already. On GPUs it is
    moved to this rank's.
    """
    if ranks.size == 1 or isinstance(model, FSDPModule):
        return settle(model)
    if any(p.is_meta for p in model.parameters()):
        raise ValueError("the model is on the meta device; load its weights before it is sharded")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (ranks.size,))
    for module in [*layers(model), model]:
        fully_shard(module, mesh=mesh)


def settle(model: nn.Module) -> None:
    """Put every parameter back into its shards.

    After a forward without backward FSDP2 leaves the root's whole, and `parameters()` then gives
    tensors that no optimizer knows. To be called before the parameters are listed.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def layers(model: nn.Module) -> list[nn.Module]:
    """Return the layers to gather one by one: those transformers keeps whole, or a ModuleList's."""
    names = getattr(model, "_no_split_modules", None) or ()
    found = [m for m in model.modules() if type(m).__name__ in names]
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return found or max(lists, key=len, default=[])


def call_inside(
    model: nn.Module,
    function: Callable[Concatenate[nn.Module, P], R],
    *args: P.args,
    **kwargs: P.kwargs,
) -> R:
    """Call function(model, ...) as if it were model.forward: with the root's parameters whole.

    For a function that calls the model's parts apart, such as the body and then the head.
    """
    if not isinstance(model, FSDPModule):
        return function(model, *args, **kwargs)
    setattr(model, _METHOD, partial(function, model))
    register_fsdp_forward_method(model, _METHOD)
    try:
        result: R = getattr(model, _METHOD)(*args, **kwargs)
    finally:
        delattr(model, _METHOD)
    return result


def whole(tensor: Tensor) -> Tensor:
    """Return the tensor itself, or all of one that is sharded; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, wanted: Tensor) -> Tensor:
    """Return a whole tensor sharded and placed as `wanted` is; every rank has the whole one."""
    value = value.to(wanted.device)
    if not isinstance(wanted, DTensor):
        return value
    return distribute_tensor(value, wanted.device_mesh, wanted.placements, src_data_rank=None)


def full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole model's state_dict on the CPU of the first rank, and {} on the others.

    Every rank must ask for it. For export: model.save_pretrained(path, state_dict=...).
    """
    settle(model)
    first = not dist.is_initialized() or dist.get_rank() == 0
    gathered = ((name, whole(value.detach())) for name, value in model.state_dict().items())
    return {name: value.cpu() for name, value in gathered if first}
