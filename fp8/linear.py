"""A linear layer whose three GEMMs read E4M3, emulated on any device.

The GEMM runs on values that went to 8 bits and back, summed in fp32: the codes and products are
those of FP8 hardware, the order of the sum is not.
Shapes: T = tokens (all leading axes), K = in_features, N = out_features.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from fp8.quantize import fake_quantize, fake_quantize_128x128
from fp8.recipe import BlockScaling


class Float8Linear(nn.Linear):
    """`nn.Linear` with FP8 inputs: same parameters, same state_dict, no state of its own.

    The weight stays in its own precision, and its gradient is not quantised: optimizer and
    checkpoints see an ordinary linear layer.
    """

    recipe: BlockScaling
    _cached: tuple[tuple[int, int], Tensor] | None

    @classmethod
    def from_float(cls, linear: nn.Linear, recipe: BlockScaling | None = None) -> "Float8Linear":
        """Return an FP8 layer with the very parameters of `linear`, not copies."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        new.weight, new.bias = linear.weight, linear.bias
        new.recipe, new._cached = recipe or BlockScaling(), None
        return new.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T + bias in the dtype of x, with x and weight rounded to E4M3."""
        x_TK = x.reshape(-1, self.in_features)
        y_TN: Tensor = _Matmul.apply(x_TK, self.weight, self.quantized_weight(), self.recipe)  # type: ignore[no-untyped-call]
        if self.bias is not None:
            y_TN = y_TN + self.bias
        return y_TN.reshape(*x.shape[:-1], self.out_features)

    def quantized_weight(self) -> Tensor:
        """Return the weight rounded to E4M3 [N, K]; computed anew only when the weight changed.

        A change is one that counts up the parameter's version: in-place operations, optimizers,
        load_state_dict. Writing through `.data` does not.
        """
        if self.weight.is_inference():  # it has no version to compare
            return _rounded_weight(self.weight, self.recipe)
        key = (self.weight._version, self.weight.data_ptr())
        if self._cached is None or self._cached[0] != key:
            self._cached = (key, _rounded_weight(self.weight, self.recipe))
        return self._cached[1]

    def extra_repr(self) -> str:
        """Show the recipe beside the sizes."""
        return f"{super().extra_repr()}, {self.recipe}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the cache out of copies and pickles."""
        return self.__dict__ | {"_cached": None}


class _Matmul(torch.autograd.Function):
    """y = x @ w.T; dx = g @ w; dw = g.T @ x; each operand scaled along the axis summed over.

    Source: InfiR2 (arXiv 2509.22536): E4M3 in all three; x and g are quantised twice, from the
    source both times; w once, because square tiles serve both directions.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TK: Tensor, _weight: Tensor, w_NK: Tensor, recipe: BlockScaling
    ) -> Tensor:
        ctx.save_for_backward(x_TK, w_NK)
        ctx.recipe = recipe
        return _gemm(fake_quantize(x_TK, recipe), w_NK.t(), recipe).to(x_TK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_TN: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x_TK, w_NK = ctx.saved_tensors
        recipe, dx_TK, dw_NK = ctx.recipe, None, None
        if ctx.needs_input_grad[0]:
            dx_TK = _gemm(fake_quantize(g_TN, recipe), w_NK, recipe)
        if ctx.needs_input_grad[1]:
            g_NT = fake_quantize(g_TN, recipe, dim=0).t()
            dw_NK = _gemm(g_NT, fake_quantize(x_TK, recipe, dim=0), recipe)
        # Autograd casts each to the dtype of the tensor it belongs to.
        return dx_TK, dw_NK, None, None


def _gemm(a: Tensor, b: Tensor, recipe: BlockScaling) -> Tensor:
    if recipe.gemm == "bfloat16":  # exact: three bits of mantissa and a power of two fit in bf16
        return a.bfloat16() @ b.bfloat16()
    return a @ b


def _rounded_weight(weight: Tensor, recipe: BlockScaling) -> Tensor:
    # A tensor made in inference mode could not be saved for a later backward.
    with torch.inference_mode(False), torch.no_grad():
        return fake_quantize_128x128(weight.detach(), recipe)


def _count_version(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
    """Count up the versions of all parameters that an optimizer stepped.

    torch's fused optimizers change weights without counting, and a cache that trusts the version
    would go on with the weights of before.
    """
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    torch.autograd.graph.increment_version([p for p in stepped if p.grad is not None])


register_optimizer_step_post_hook(_count_version)
