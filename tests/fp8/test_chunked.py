"""Losses in chunks equal those of whole logits. What they keep: test_losses.py."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fp8.chunked import chunked_terms

N, H, V = 7, 6, 12
MIX = torch.tensor([0.3, 0.7], dtype=torch.float64)


def terms(n: int) -> Callable[[Tensor, int, int], Tensor]:
    """Cross-entropy, and something that reads every logit and where it stands."""
    labels = torch.randint(0, V, (n,), generator=torch.Generator().manual_seed(n))
    place = torch.arange(n, dtype=torch.float64)

    def of(logits: Tensor, start: int, stop: int) -> Tensor:
        logprobs = logits.log_softmax(-1)
        own = logprobs.gather(-1, labels[start:stop, None])
        square = logprobs.square().sum(-1) * place[start:stop]
        return torch.stack([-own.sum(), square.sum()]) / n

    return of


def hidden_and_head(n: int) -> tuple[Tensor, nn.Linear]:
    torch.manual_seed(3)
    hidden = torch.randn(n, H, dtype=torch.float64).requires_grad_()
    return hidden, nn.Linear(H, V, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 30), st.lists(st.integers(1, 29), max_size=5), st.sampled_from([1.0, -3.0, 0.01])
)
def test_chunks_give_the_loss_terms_and_gradients_of_the_whole(
    n: int, edges: list[int], scale: float
) -> None:
    hidden, head = hidden_and_head(n)
    cuts = sorted({0, n, *(e for e in edges if e < n)})
    whole = terms(n)(head(hidden), 0, n)
    loss, found = chunked_terms(hidden, head, terms(n), MIX, cuts)
    torch.testing.assert_close(found, whole.detach())
    assert not found.requires_grad
    torch.testing.assert_close(loss, (MIX * whole).sum())
    leaves = [hidden, *head.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(loss * scale, leaves),
        torch.autograd.grad((MIX * whole).sum() * scale, leaves),
    )
    with torch.no_grad():
        quiet, _ = chunked_terms(hidden, head, terms(n), MIX, cuts)
    torch.testing.assert_close(quiet, loss.detach())


def test_its_gradients_agree_with_finite_differences() -> None:
    hidden, head = hidden_and_head(N)

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_terms(hidden, head, terms(N), MIX, [0, 3, N])[0]

    # gradcheck perturbs the parameters in place: the head sees it.
    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_parts_of_a_parameters_gradient_are_not_lost(dtype: torch.dtype) -> None:
    """Summed in the parameter's own dtype, a bf16 gradient would stop growing at 256 parts."""
    head = nn.Linear(1, 1, bias=False, dtype=dtype)
    hidden = torch.ones(600, 1, dtype=dtype)
    loss, _ = chunked_terms(
        hidden, head, lambda z, *_: z.float().sum()[None], torch.ones(1), list(range(601))
    )
    (grad,) = torch.autograd.grad(loss, head.weight)
    assert grad.dtype == dtype
    assert float(grad) == 600
