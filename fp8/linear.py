"""A linear layer whose three GEMMs read low-precision operands; a backend does the arithmetic.

Shapes: T = tokens (all leading axes), K = in_features, N = out_features.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fp8.amax import GRAD_OUTPUT, INPUT, AmaxHistory
from fp8.backends.base import Backend, Operand, Saved, pack_scale, unpack_scale
from fp8.backends.select import select
from fp8.backends.transformer_engine import TransformerEngine
from fp8.epoch import weight_epoch
from fp8.recipe import BlockScaling, Recipe

_DEFAULT: Final = BlockScaling()
_enabled = True


@contextlib.contextmanager
def autocast(enabled: bool = True) -> Iterator[None]:
    """Run converted layers in low precision, or, with False, as the linear layers they were."""
    global _enabled
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def low_precision_enabled() -> bool:
    """Whether converted layers run in low precision now; see `autocast`."""
    return _enabled


class Float8Linear(nn.Linear):
    """`nn.Linear` with low-precision GEMMs: same parameters, same state_dict.

    The weight stays in its own precision, and its gradient is not quantised: optimizer and
    checkpoints see an ordinary linear layer.
    """

    recipe: Recipe
    backend: Backend | TransformerEngine
    fallback: str
    """Why no faster backend runs it; '' if the fastest does."""
    amax: AmaxHistory | None
    """What delayed scaling remembers; None for all other recipes."""
    _cached: tuple[tuple[int, ...], tuple[Operand, Operand]] | None

    @classmethod
    def from_float(cls, linear: nn.Linear, recipe: Recipe | None = None) -> "Float8Linear":
        """Return a low-precision layer with the very parameters of `linear`, not copies.

        Raises: UnsupportedBackendError when the recipe names a backend that cannot run it.
        """
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new.recipe, new._cached = recipe or _DEFAULT, None
        new.amax = AmaxHistory(new.recipe.history) if new.recipe.history else None
        new.choose_backend()
        return new.train(linear.training)

    def choose_backend(self) -> None:
        """Take the backend for the device that the weight is on now."""
        self.backend, self.fallback = select(
            self.recipe, self.in_features, self.out_features, self.weight.device
        )

    def to_float(self) -> nn.Linear:
        """Return a plain linear layer with the very parameters of this one."""
        new = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        new.weight, new.bias = self.weight, self.bias
        return new.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias in the dtype of x, with x and weight quantised."""
        if not _enabled:
            return nn.functional.linear(x, self.weight, self.bias)
        if isinstance(self.backend, TransformerEngine):
            y: Tensor = self.backend.linear(self, x, self.recipe)
            return y
        kind = x.device.type
        if torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        with torch.autocast(kind, enabled=False):
            y_TN = self._multiply(x)
            if self.bias is not None:
                y_TN = y_TN + self.bias.to(y_TN.dtype)
        return y_TN.reshape(*x.shape[:-1], self.out_features)

    def _multiply(self, x: Tensor) -> Tensor:
        keep = torch.is_grad_enabled() and self.weight.requires_grad
        operand, saved = self.quantized_input(x, keep=keep)
        rows, columns = self.quantized_weight()
        x_TK = x.reshape(-1, self.in_features)
        y_TN: Tensor = _Matmul.apply(  # type: ignore[no-untyped-call]
            x_TK, self.weight, operand, saved, rows, columns, self
        )
        return y_TN

    def quantized_input(self, x: Tensor, *, keep: bool) -> tuple[Operand, Saved | None]:
        """Return the GEMM operand of x and, if `keep`, its codes for backward.

        Layers that read the same tensor (q, k, v; gate, up) share one copy, which lives as long
        as the tensor does.
        """
        assert not isinstance(self.backend, TransformerEngine)
        # Without its gradient: a backend's operators have none, the layer brings its own.
        x_TK = x.detach().reshape(-1, self.in_features)
        if self.amax is not None:
            amax = self.amax.scale_by(INPUT, x_TK, record=torch.is_grad_enabled())
            return self.backend.input(x_TK, self.recipe, keep=keep, amax=amax)
        if torch.compiler.is_compiling() or x.is_inference():
            return self.backend.input(x_TK, self.recipe, keep=keep, amax=None)
        key, shared = self._copy_key(x, keep), getattr(x, "_float8_copy", None)
        if shared is None or shared[0] != key:
            self.share_input(x, self.backend.input(x_TK, self.recipe, keep=keep, amax=None))
            shared = x._float8_copy  # type: ignore[attr-defined]
        result: tuple[Operand, Saved | None] = shared[1]
        return result

    def share_input(self, x: Tensor, made: tuple[Operand, Saved | None]) -> None:
        """Have layers of this recipe and backend read `made` when they read x."""
        x._float8_copy = (self._copy_key(x, made[1] is not None), made)  # type: ignore[attr-defined]

    def _copy_key(self, x: Tensor, keep: bool) -> tuple[object, ...]:
        return x._version, self.recipe, self.backend.name, keep

    def quantized_weight(self) -> tuple[Operand, Operand]:
        """Return the weight's operands [N, K] and [K, N]; computed anew only when it changed.

        A change is one that counts up the parameter's version (in-place operations,
        load_state_dict) or a step of any optimizer. Writing through `.data` is neither.
        """
        assert not isinstance(self.backend, TransformerEngine)
        if torch.compiler.is_compiling() or self.weight.is_inference():
            return self.backend.weight(self.weight.detach(), self.recipe)
        key = (weight_epoch(), self.weight._version, self.weight.data_ptr())
        if self._cached is None or self._cached[0] != key:
            # A tensor made in inference mode could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                self._cached = (key, self.backend.weight(self.weight.detach(), self.recipe))
        return self._cached[1]

    def extra_repr(self) -> str:
        """Show recipe and backend beside the sizes."""
        return f"{super().extra_repr()}, recipe={self.recipe.name}, backend={self.backend.name}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return self.__dict__ | {"_cached": None}


class _Matmul(torch.autograd.Function):
    """y = x @ w.T; dx = g @ w; dw = g.T @ x; each operand scaled along the axis summed over.

    Source: InfiR2 (arXiv 2509.22536). Only codes of x are kept for backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        weight: Tensor,
        operand: Operand,
        saved: Saved | None,
        rows: Operand,
        columns: Operand,
        layer: Float8Linear,
    ) -> Tensor:
        assert not isinstance(layer.backend, TransformerEngine)
        ctx.save_for_backward(*kept(saved, layer.recipe))
        ctx.layer, ctx.columns = layer, columns
        ctx.tokens, ctx.dtypes = x_TK.shape[0], (x_TK.dtype, weight.dtype)
        return layer.backend.gemm(operand, rows, layer.recipe, x_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TN: Tensor) -> tuple[Tensor | None, ...]:
        layer, (x_dtype, w_dtype) = ctx.layer, ctx.dtypes
        backend, recipe = layer.backend, layer.recipe
        with torch.autocast(g_TN.device.type, enabled=False):
            needs_x, needs_w = ctx.needs_input_grad[:2]
            amax = (
                None if layer.amax is None else layer.amax.scale_by(GRAD_OUTPUT, g_TN, record=True)
            )
            g_rows, g_columns = backend.gradient(g_TN, recipe, dual=needs_w, amax=amax)
            dx_TK = backend.gemm(g_rows, ctx.columns, recipe, x_dtype) if needs_x else None
            dw_NK = None
            if needs_w:
                x_columns = backend.saved_input(
                    restored(ctx.saved_tensors, recipe), recipe, ctx.tokens, layer.in_features
                )
                dw_NK = backend.gemm(g_columns, x_columns, recipe, w_dtype)
        return dx_TK, dw_NK, None, None, None, None, None


def kept(saved: Saved | None, recipe: Recipe) -> tuple[Tensor | None, ...]:
    """Return what autograd is to keep of an input; scales in a byte each where that is exact."""
    if saved is None:
        return ()
    if recipe.input.scale_format == "power_of_two":
        return saved.codes, pack_scale(saved.scale), saved.outer
    return saved


def restored(tensors: Sequence[Tensor], recipe: Recipe) -> Saved:
    """Return the input that `kept` gave the tensors of."""
    codes, scale, outer = tensors
    if recipe.input.scale_format == "power_of_two":
        scale = unpack_scale(scale)
    return Saved(codes, scale, outer)


def float8_state(model: nn.Module) -> dict[str, Tensor]:
    """What a resumed run needs beside the parameters: empty but for delayed scaling."""
    return {
        f"{name}.{key}": tensor
        for name, layer in model.named_modules()
        if isinstance(layer, Float8Linear) and layer.amax is not None
        for key, tensor in layer.amax.state().items()
    }


def load_float8_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `float8_state` gave.

    Raises: ValueError when the names are not those of the model's layers; nothing is changed then.
    """
    wanted = float8_state(model).keys()
    if wanted != state.keys():
        odd = sorted(wanted ^ state.keys())
        raise ValueError(
            f"FP8 state has {len(odd)} names too many or too few, the first is {odd[0]}; "
            "give the state of a model converted with the same recipe"
        )
    for name, layer in model.named_modules():
        if isinstance(layer, Float8Linear) and layer.amax is not None:
            layer.amax.load({k: state[f"{name}.{k}"] for k in layer.amax.state()})
