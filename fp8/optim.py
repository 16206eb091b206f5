"""AdamW with moments of 8 bits: 2.06 bytes a parameter where fp32 moments take 8.

`fp8.moments` holds the codes and the arithmetic; this is the torch optimizer around them.
The state of a parameter is plain tensors under string keys, so that a checkpoint of them resumes
bit for bit: step; exp_avg and exp_avg_sq, float32 or codes with exp_avg_scale and
exp_avg_sq_scale beside them; master, for a bfloat16 parameter that has one.
A DTensor (FSDP2) is stepped shard by shard: its state is that of the local shard, and groups are
counted from the shard's first element.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import ParamsT

from fp8.adamw import Factors, Operands, float8_adamw_step, reference_steps
from fp8.moments import round_stochastically
from fp8.optim_state import (
    State,
    StateBytes,
    check_settings,
    check_state,
    has_codes,
    local_tensor,
    may_have_codes,
    quantize_moments,
    start,
    state_bytes,
)

__all__ = ["Float8AdamW", "StateBytes", "check_state", "state_bytes"]


class Float8AdamW(torch.optim.Optimizer):
    """AdamW (decoupled weight decay) that keeps its moments in 8 bits and its weights as you say.

    A float32 parameter is its own master. Non-finite gradients are refused before anything is
    changed; a loop that has looked at them already may say check_finite=False, and then a group
    of 128 elements that meets one turns into NaN, weights and all, where every loss shows it.

    Args:
        params: float32 or bfloat16; tensors, named tensors or groups, and any option below may
            differ from group to group.
        lr: peak or constant learning rate; write group["lr"] to change it between steps.
        betas: how much of the moments a step keeps, both in [0, 1).
        eps: added to the root of the second moment; above 0.
        weight_decay: a step takes lr * weight_decay of the weights away.
        moments: float8, or float32 to have torch's AdamW.
        master: what moves a bfloat16 parameter: an fp32 master in the state, or nothing but the
            parameter, rounded stochastically with a seed from torch's generator of its device.
        quantize_after: this many first steps have fp32 moments.
        check_finite: whether to look at the gradients first; costs one pass over them.

    Raises: ValueError for a setting out of range, a parameter of another dtype, a sparse gradient.
    """

    def __init__(  # noqa: PLR0913 (torch's own signature, and ours behind it by keyword)
        self,
        params: ParamsT,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        moments: Literal["float8", "float32"] = "float8",
        master: Literal["float32", "bfloat16_stochastic"] = "float32",
        quantize_after: int = 0,
        check_finite: bool = True,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "moments": moments,
            "master": master,
            "quantize_after": quantize_after,
            "check_finite": check_finite,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with settings of their own; what is not given is as for the others."""
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            for p in self.param_groups[-1]["params"]:
                if p.dtype not in (torch.float32, torch.bfloat16):
                    raise ValueError(
                        f"a parameter of shape {tuple(p.shape)} is {p.dtype}; Float8AdamW moves "
                        "float32 and bfloat16: convert the model, or leave the parameter out"
                    )
        except ValueError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take state and groups; groups of another AdamW get the settings they do not know."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient.

        Raises:
            FloatingPointError: a gradient is NaN or infinite, or its square is; nothing was
                changed. Skip the step, or clip and scale the loss so that it does not happen.
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        _check_gradients(self.param_groups)
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        in_codes: dict[tuple[torch.device, int], list[_Job]] = defaultdict(list)
        in_float32: dict[torch.device, list[_Job]] = defaultdict(list)
        to_write_back: list[tuple[Tensor, Tensor]] = []
        for p in group["params"]:
            if p.grad is None:
                continue
            local = local_tensor(p.detach())
            job = _Job(local.contiguous(), local_tensor(p.grad).contiguous(), self.state[p])
            if job.param.data_ptr() != local.data_ptr():
                to_write_back.append((local, job.param))
            if not job.state:
                start(p, job.state, group)
            step = int(job.state["step"])
            if may_have_codes(p, group) and step >= group["quantize_after"]:
                quantize_moments(job.state)
            if has_codes(job.state):
                in_codes[job.param.device, step + 1].append(job)
            else:
                in_float32[job.param.device].append(job)
        for (_, step), jobs in in_codes.items():
            _step_codes(jobs, step, group)
        for jobs in in_float32.values():
            _step_float32(jobs, group)
        for local, moved in to_write_back:
            local.copy_(moved)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; copied, and in the dtypes it has, where torch casts it to the weights'.

        The state of a torch.optim.AdamW is taken too, and becomes 8 bits at the next step.

        Raises: ValueError when it is of other parameters or incomplete; nothing was changed then.
        """
        loaded: dict[str, Any] = {}

        def look_at(_: torch.optim.Optimizer, final: dict[str, Any]) -> None:
            loaded.update(final)
            for p, state in self._by_parameter(final):
                check_state(p, state)

        handle = self.register_load_state_dict_pre_hook(look_at)  # the last one, so after others
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for p, state in self._by_parameter(loaded):
            for key, value in state.items():
                device = value.device if key == "step" else p.device
                self.state[p][key] = value.to(device, copy=True)

    def _by_parameter(self, state_dict: Mapping[str, Any]) -> Iterator[tuple[Tensor, State]]:
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        mine = chain.from_iterable(group["params"] for group in self.param_groups)
        for number, p in zip(ids, mine, strict=False):  # torch says it when the lengths differ
            if number in state_dict["state"]:
                yield p, state_dict["state"][number]


class _Job(NamedTuple):
    """A parameter to move, its gradient and its state: local tensors, contiguous."""

    param: Tensor
    grad: Tensor
    state: State


def _step_codes(jobs: list[_Job], step: int, group: Mapping[str, Any]) -> None:
    factors = Factors.of_step(
        step,
        lr=float(group["lr"]),
        betas=group["betas"],
        eps=group["eps"],
        weight_decay=group["weight_decay"],
    )
    work = [_operands(job) for job in jobs]
    if work[0].param.is_cuda:
        for operands in work:
            float8_adamw_step(*operands, list(factors), step)
    else:  # what the op would do, without the price of a dispatch
        reference_steps(work, factors, step)
    for job in jobs:
        job.state["step"].add_(1)


def _operands(job: _Job) -> Operands:
    param, grad, state = job
    m_codes, v_codes = state["exp_avg"], state["exp_avg_sq"]
    scales = state["exp_avg_scale"], state["exp_avg_sq_scale"]
    master = state.get("master")
    return Operands(param, master, _seed(job), grad, m_codes, scales[0], v_codes, scales[1])


def _step_float32(jobs: list[_Job], group: Mapping[str, Any]) -> None:
    """Do torch's own step on all of them at once."""
    weights = [_in_float32(job) for job in jobs]
    on_cpu = weights[0].device.type == "cpu"
    adamw(
        weights,
        [job.grad.float() for job in jobs],
        [job.state["exp_avg"] for job in jobs],
        [job.state["exp_avg_sq"] for job in jobs],
        [],
        [job.state["step"] for job in jobs],
        fused=on_cpu,  # elsewhere it wants the step counters on the device
        foreach=not on_cpu,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    for job, moved in zip(jobs, weights, strict=True):
        seed = _seed(job)
        if seed is not None:
            job.param.copy_(round_stochastically(moved, seed))
        elif "master" in job.state:
            job.param.copy_(moved)


def _in_float32(job: _Job) -> Tensor:
    return job.state["master"] if "master" in job.state else job.param.float()


def _seed(job: _Job) -> Tensor | None:
    """Draw a seed for weights that are rounded stochastically, from the device's generator."""
    if job.param.dtype == torch.float32 or "master" in job.state:
        return None
    bound = (1 << 31) - 1
    return torch.randint(-bound, bound, (1,), dtype=torch.int32, device=job.param.device)


def _check_gradients(groups: list[dict[str, Any]]) -> None:
    found: dict[str, Tensor] = {}
    for number, group in enumerate(groups):
        names = group.get("param_names", range(len(group["params"])))
        for name, p in zip(names, group["params"], strict=True):
            if p.grad is None:
                continue
            where = f"parameter {name} of group {number}, shape {tuple(p.shape)}"
            if p.grad.layout is not torch.strided:
                raise ValueError(
                    f"the gradient of {where} is {p.grad.layout}; Float8AdamW needs dense "
                    "gradients: set sparse=False on the embedding"
                )
            if group["check_finite"]:
                found[where] = local_tensor(p.grad)
    # A norm is finite exactly when all squares and their sum are: one pass, and one wait for a GPU.
    if found and not _has_finite_norm(list(found.values())):
        guilty = [where for where, grad in found.items() if not _has_finite_norm([grad])]
        raise FloatingPointError(
            f"the gradient of {(guilty or ['all parameters together'])[0]} has a norm that is not "
            "finite; nothing was changed: skip this step, and if it comes again look at its batch, "
            "or lower lr"
        )


def _has_finite_norm(grads: list[Tensor]) -> bool:
    return math.isfinite(float(torch.nn.utils.get_total_norm(grads)))
