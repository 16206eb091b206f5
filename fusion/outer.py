"""Rounds over weights: the server's step from the participants' deltas.

Delta = the weighted mean of what the participants changed; the step is an optimizer's with -Delta
for the gradient. All in float64, stored in float32; the order of the participants changes no bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fusion.merge import State, require_same
from fusion.merge_methods import Float64
from fusion.merge_settings import MergeError

OuterMethod = Literal["fedavg", "fedavgm", "fedadagrad", "fedadam", "fedyogi", "diloco"]
FORMAT: Final = "cofuse-outer-1"


@dataclass(frozen=True, slots=True)
class _Row:
    """The defaults of a method; None: it does not read that setting."""

    lr: float
    momentum: float | None = None
    beta2: float | None = None
    tau: float | None = None


OUTER: Final[Mapping[str, _Row]] = MappingProxyType(
    {
        # arXiv 1602.05629: the new model is the mean of the participants'.
        "fedavg": _Row(lr=1.0),
        # arXiv 1909.06335: v <- m v + Delta; x <- x + lr v.
        "fedavgm": _Row(lr=1.0, momentum=0.9),
        # arXiv 2003.00295: beta 0.9 (Adagrad: 0), 0.99, tau 1e-3. The paper tunes lr by task.
        "fedadagrad": _Row(lr=0.01, momentum=0.0, tau=1e-3),
        "fedadam": _Row(lr=0.01, momentum=0.9, beta2=0.99, tau=1e-3),
        "fedyogi": _Row(lr=0.01, momentum=0.9, beta2=0.99, tau=1e-3),
        # arXiv 2311.08105: SGD with Nesterov momentum, after some 500 local steps.
        "diloco": _Row(lr=0.7, momentum=0.9),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OuterSettings:
    """How the server steps. None takes the method's default; what it does not read is refused."""

    method: OuterMethod
    lr: float | None = None
    """Factor on the step; it may change from round to round."""
    momentum: float | None = None
    """Of the first moment (beta1 of FedOpt), in [0, 1)."""
    beta2: float | None = None
    """Of the second moment, in [0, 1)."""
    tau: float | None = None
    """Added to the second moment's root, in units of a delta: smaller adapts more."""

    def __post_init__(self) -> None:
        if self.method not in OUTER:
            raise MergeError(
                f"unknown outer method {self.method!r}; choose one of {', '.join(OUTER)}"
            )
        used = [name for name, value in asdict(OUTER[self.method]).items() if value is not None]
        for name in ("lr", "momentum", "beta2", "tau"):
            if getattr(self, name) is not None and name not in used:
                raise MergeError(f"{self.method} does not read {name}; it reads {', '.join(used)}")
        for name, value in self.parameters().items():
            inside = 0 <= value < 1 if name in ("momentum", "beta2") else 0 < value < math.inf
            if not inside:
                wanted = "[0, 1)" if name in ("momentum", "beta2") else "above 0"
                raise MergeError(f"{name} is {value}; wanted {wanted}")

    def parameters(self) -> dict[str, float]:
        """Return what the method reads, given or default."""
        defaults = asdict(OUTER[self.method])
        given = {n: getattr(self, n) for n in defaults}
        return {
            n: float(defaults[n] if given[n] is None else given[n])
            for n in defaults
            if defaults[n] is not None
        }

    def kept(self) -> dict[str, Any]:
        """Return what must stay the same from round to round: all but lr."""
        return {"method": self.method} | {n: v for n, v in self.parameters().items() if n != "lr"}


@dataclass(frozen=True, slots=True)
class OuterState:
    """What the server remembers between rounds."""

    rounds: int = 0
    """Steps done."""
    first: State = field(default_factory=dict)
    """Momentum by parameter; empty where there is none."""
    second: State = field(default_factory=dict)
    """Second moments by parameter."""


def outer_step(
    base: State,
    deltas: Mapping[str, State],
    settings: OuterSettings,
    state: OuterState | None = None,
    weights: Mapping[str, float] | None = None,
) -> tuple[dict[str, NDArray[np.float32]], OuterState]:
    """Take one step from the base; the inputs stay as they are.

    Args:
        base: the pivot that the participants started from.
        deltas: by participant, what it changed; names and shapes of the base.
        settings: the optimizer.
        state: of the round before; None at the first.
        weights: n_i by participant (say, tokens), at least 0; the mean is weighted by them. None:
            all alike.
    Returns: the new pivot in float32, and the state for the round after.
    Raises: MergeError for deltas, weights or a state that do not fit, or values not finite.
    """
    state = OuterState() if state is None else state
    shares = _shares(sorted(deltas), weights)
    for name in shares:
        require_same(base, deltas[name], name)
    for memory in (state.first, state.second):
        if memory:
            require_same(base, memory, "of the outer state")
    rule, parameters = _RULES[settings.method], settings.parameters()
    new, first, second = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for name, value in base.items():
        mean = np.asarray(
            sum(share * deltas[who][name].astype(np.float64) for who, share in shares.items())
        )
        if not np.isfinite(mean).all():
            raise MergeError(f"a delta of {name} holds NaN or infinity; leave its sender out")
        step, moment, square = rule(
            mean, _wide(state.first.get(name)), _wide(state.second.get(name)), parameters
        )
        new[name] = (value.astype(np.float64) + parameters["lr"] * step).astype(np.float32)
        if moment is not None:
            first[name] = moment.astype(np.float32)
        if square is not None:
            second[name] = square.astype(np.float32)
    return new, OuterState(state.rounds + 1, first, second)


def _shares(names: list[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    if not names:
        raise MergeError("a round without a delta takes no step; wait for one")
    given = dict.fromkeys(names, 1.0) if weights is None else weights
    if set(given) != set(names):
        raise MergeError(f"weights and deltas differ in {sorted(set(given) ^ set(names))}")
    values = [given[name] for name in names]
    if not all(math.isfinite(v) and v >= 0 for v in values) or sum(values) <= 0:
        raise MergeError(f"weights {dict(given)}; wanted finite, at least 0, and not all 0")
    return {name: given[name] / sum(values) for name in names}


def _wide(array: NDArray[np.float32] | None) -> Float64 | None:
    return None if array is None else array.astype(np.float64)


# ---------------------------------------------------------------------------------- the rules
_Moments = tuple[Float64, Float64 | None, Float64 | None]
"""The step before lr, and both moments to keep."""


def _average(
    delta: Float64, _first: Float64 | None, _second: Float64 | None, _given: Mapping[str, float]
) -> _Moments:
    return delta, None, None


def _heavy_ball(
    delta: Float64, first: Float64 | None, _second: Float64 | None, given: Mapping[str, float]
) -> _Moments:
    first = delta if first is None else given["momentum"] * first + delta
    return first, first, None


def _nesterov(
    delta: Float64, first: Float64 | None, _second: Float64 | None, given: Mapping[str, float]
) -> _Moments:
    """Look ahead along the momentum that this delta is already in, as torch.optim.SGD."""
    first = delta if first is None else given["momentum"] * first + delta
    return delta + given["momentum"] * first, first, None


def _adaptive(
    grown: Callable[[Float64, Float64, Mapping[str, float]], Float64],
) -> Callable[..., _Moments]:
    """FedOpt, Algorithm 2: no bias correction, tau outside the root, and v starts at tau**2."""

    def rule(
        delta: Float64, first: Float64 | None, second: Float64 | None, given: Mapping[str, float]
    ) -> _Moments:
        beta, tau = given["momentum"], given["tau"]
        first = (1 - beta) * delta + (0 if first is None else beta * first)
        second = np.full_like(delta, tau**2) if second is None else second
        second = grown(second, np.square(delta), given)
        return first / (np.sqrt(second) + tau), first, second

    return rule


def _yogi(v: Float64, square: Float64, given: Mapping[str, float]) -> Float64:
    return np.asarray(v - (1 - given["beta2"]) * square * np.sign(v - square))


_RULES: Final[Mapping[str, Callable[..., _Moments]]] = MappingProxyType(
    {
        "fedavg": _average,
        "fedavgm": _heavy_ball,
        "diloco": _nesterov,
        "fedadagrad": _adaptive(lambda v, square, _: v + square),
        "fedadam": _adaptive(lambda v, sq, given: given["beta2"] * v + (1 - given["beta2"]) * sq),
        "fedyogi": _adaptive(_yogi),
    }
)


# ----------------------------------------------------------------------------- between rounds
def save_outer(
    path: Path, state: OuterState, settings: OuterSettings, *, pivot_sha256: str
) -> None:
    """Write the state; the file appears whole or not at all.

    Args: pivot_sha256: the pivot that the step made, from which the next round starts.
    """
    arrays = {f"first.{n}": np.ascontiguousarray(v) for n, v in state.first.items()}
    arrays |= {f"second.{n}": np.ascontiguousarray(v) for n, v in state.second.items()}
    header = {
        "format": FORMAT,
        "settings": json.dumps(settings.kept(), sort_keys=True),
        "pivot_sha256": pivot_sha256,
        "rounds": str(state.rounds),
    }
    partial = path.with_name(path.name + ".partial")
    save_file(arrays, partial, metadata=header)
    partial.replace(path)


def load_outer(path: Path, settings: OuterSettings, *, pivot_sha256: str) -> OuterState:
    """Read the state of the round before.

    Raises: MergeError when it is damaged, or of another method, other settings (but for lr) or
        another pivot: going on from it would be a different optimizer without a word.
    """
    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MergeError(
            f"{path} cannot be read ({error}); begin anew without a state, or copy it again"
        ) from error
    wanted = {
        "format": FORMAT,
        "settings": json.dumps(settings.kept(), sort_keys=True),
        "pivot_sha256": pivot_sha256,
    }
    for name, value in wanted.items():
        if header.get(name) != value:
            raise MergeError(
                f"{path} has {name} {header.get(name)}; wanted {value}: give the state that "
                "belongs to this pivot and these settings, or begin anew without one"
            )
    parts: dict[str, dict[str, Any]] = {"first": {}, "second": {}}
    for name, array in arrays.items():
        kind, _, parameter = name.partition(".")
        parts.setdefault(kind, {})[parameter] = array
    if parts.keys() != {"first", "second"} or not header.get("rounds", "").isdecimal():
        raise MergeError(f"{path} is no state of ours; begin anew without one")
    return OuterState(int(header["rounds"]), parts["first"], parts["second"])
