"""The settings of Float8AdamW, and a parameter's state: how it starts, becomes codes, is weighed.

A state is plain tensors: step; exp_avg and exp_avg_sq, float32 or codes with exp_avg_scale and
exp_avg_sq_scale beside them; master, for a bfloat16 parameter that has one. Codes are uint8, which
pickle and every collective know; those of 8-bit floats are foreign to both.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp8.moments import GROUP, dither, encode_first, encode_second, groups_of

MIN_ELEMENTS: Final = 4096
"""Smaller tensors, and vectors of any length, keep fp32 moments: they weigh nothing."""

State = dict[str, Tensor]


def start(p: Tensor, state: State, group: Mapping[str, Any]) -> None:
    """Fill an empty state, with codes at once if that is where it ends."""
    param = local_tensor(p.detach()).contiguous()
    state["step"] = torch.zeros((), dtype=torch.float32)
    if may_have_codes(p, group) and group["quantize_after"] == 0:
        scales = torch.ones(groups_of(param.numel()), dtype=torch.float32, device=param.device)
        state["exp_avg"] = torch.zeros_like(param, dtype=torch.uint8)
        state["exp_avg_scale"] = scales
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.uint8)
        state["exp_avg_sq_scale"] = torch.zeros_like(scales)
    else:
        state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
    if param.dtype == torch.bfloat16 and group["master"] == "float32":
        state["master"] = param.float()


def quantize_moments(state: State) -> None:
    """Turn fp32 moments into codes; codes stay."""
    if has_codes(state):
        return
    m, v = state["exp_avg"], state["exp_avg_sq"]
    tail = groups_of(m.numel()) * GROUP - m.numel()
    m_GB, v_GB = (pad(moment.reshape(-1), (0, tail)).view(-1, GROUP) for moment in (m, v))
    m_codes, state["exp_avg_scale"] = encode_first(m_GB)
    v_codes, state["exp_avg_sq_scale"] = encode_second(v_GB, dither(int(state["step"]), v.device))
    whole = slice(None, m.numel())
    state["exp_avg"] = m_codes.view(-1)[whole].clone().view(m.shape)
    state["exp_avg_sq"] = v_codes.view(-1)[whole].clone().view(v.shape)


def may_have_codes(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Tell whether a parameter's moments end as codes: by the whole size, shards decide alike."""
    return group["moments"] == "float8" and p.ndim >= 2 and p.numel() >= MIN_ELEMENTS


def has_codes(state: Mapping[str, Tensor]) -> bool:
    """Tell whether moments are codes; False for an empty state too."""
    return "exp_avg" in state and state["exp_avg"].dtype == torch.uint8


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the shard of a DTensor, and any other tensor itself."""
    # Asked for by its method: importing the class costs every program half a second.
    to_local: Callable[[], Tensor] | None = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class StateBytes(NamedTuple):
    """What an optimizer keeps, in bytes on this process."""

    moments: int
    """Codes, scales and step counters: all but the masters."""
    masters: int
    parameters: int
    """Elements of the parameters that have a state."""

    @property
    def moments_per_parameter(self) -> float:
        """Bytes of moments per parameter; 0 before the first step."""
        return self.moments / max(1, self.parameters)


def state_bytes(optimizer: torch.optim.Optimizer) -> StateBytes:
    """Measure the tensors in the state of any optimizer."""
    masters = moments = parameters = 0
    for p, state in optimizer.state.items():
        parameters += local_tensor(p).numel() if state else 0
        for key, value in state.items():
            if isinstance(value, Tensor):
                masters += value.nbytes * (key == "master")
                moments += value.nbytes * (key != "master")
    return StateBytes(moments, masters, parameters)


def check_state(p: Tensor, state: Mapping[str, Tensor]) -> None:
    """Refuse a state that does not belong to the parameter, or of which a part is missing.

    Raises: ValueError that names the tensor.
    """
    shape = local_tensor(p.detach()).shape
    scales = torch.Size([groups_of(shape.numel())])
    wanted = {"step": torch.Size(), "exp_avg": shape, "exp_avg_sq": shape}
    if has_codes(state):
        wanted |= {"exp_avg_scale": scales, "exp_avg_sq_scale": scales}
    allowed = {**wanted, "master": shape}
    found = {key: value.shape for key, value in state.items()}
    differing = [key for key in wanted if key not in found]
    differing += [key for key in found if found[key] != allowed.get(key)]
    if differing:
        key = differing[0]
        has, needs = ([*size[key]] if key in size else "none" for size in (found, allowed))
        raise ValueError(
            f"the optimizer state of a parameter of shape {tuple(shape)} has {key} of shape {has}; "
            f"wanted {needs}; load the state of the same model and the same number of processes"
        )


def check_settings(group: Mapping[str, Any]) -> None:
    """Refuse a setting that is out of range. Raises: ValueError that names it."""
    rules = {
        "lr": 0 <= group["lr"] < math.inf,
        "betas": len(group["betas"]) == 2 and all(0 <= beta < 1 for beta in group["betas"]),
        "eps": 0 < group["eps"] < math.inf,
        "weight_decay": 0 <= group["weight_decay"] < math.inf,
        "moments": group["moments"] in ("float8", "float32"),
        "master": group["master"] in ("float32", "bfloat16_stochastic"),
        "quantize_after": group["quantize_after"] >= 0,
    }
    for name, holds in rules.items():
        if not holds:
            raise ValueError(f"Float8AdamW: {name} is {group[name]!r}: out of range")
