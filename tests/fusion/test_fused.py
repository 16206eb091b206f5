"""Selected log-probabilities and chunked losses equal the plain computation, and keep less."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fp8.linear import Float8Linear
from fp8.recipe import BlockScaling
from fusion.fused import chunked_terms, cut_between, selected_logprobs

N, H, V, C = 7, 6, 12, 3
MIX = torch.tensor([0.3, 0.7], dtype=torch.float64)


def inputs(
    n: int = N, v: int = V, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + v)
    logits = (torch.randn(n, v, generator=g, dtype=torch.float64) * 3).to(dtype)
    ids = torch.rand(n, v, generator=g).argsort(-1)[:, :C]
    labels = torch.randint(0, v, (n,), generator=g)
    ids[0, 0], ids[1], ids[2, 2] = -1, -1, -1  # a gap, a row without names, a shorter row
    labels[3] = ids[3, 0]
    return logits, labels, ids


def plain(logits: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprobs, named = logits.log_softmax(-1), ids >= 0
    others = torch.ones_like(logprobs, dtype=torch.bool)
    for n, row in enumerate(ids.tolist()):
        others[n, [i for i in row if i >= 0]] = False
    return (
        logprobs.gather(-1, labels[:, None])[:, 0],
        logprobs.gather(-1, ids.clamp_min(0)) * named,
        logprobs.masked_fill(~others, -torch.inf).logsumexp(-1) * named.any(-1),
    )


# -- selected_logprobs


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 20), st.integers(4, 40), st.sampled_from([0.0, -1e3, 80.0]))
def test_selected_are_the_log_softmax_at_the_ids(n: int, v: int, constant: float) -> None:
    logits, labels, ids = inputs(n, v)
    found = selected_logprobs(logits + constant, labels, ids)
    torch.testing.assert_close(found, plain(logits, labels, ids), rtol=1e-9, atol=1e-9)


def test_their_gradients_agree_with_finite_differences() -> None:
    logits, labels, ids = inputs()
    z = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: selected_logprobs(z, labels, ids), z)
    doubled = torch.cat([ids, ids[:, :1]], -1)  # an id that comes twice
    assert torch.autograd.gradcheck(lambda z: selected_logprobs(z, labels, doubled), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_logits_give_fp32_results_and_gradients_of_their_own_type(
    dtype: torch.dtype,
) -> None:
    logits, labels, ids = inputs(dtype=dtype)
    found = selected_logprobs(logits.requires_grad_(), labels, ids)
    wanted = plain(logits.detach().double(), labels, ids)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in found), logits)
    assert grad.dtype == dtype


def test_the_mass_of_others_keeps_its_digits_next_to_a_sure_id() -> None:
    z = torch.tensor([[30.0, 0.0, -1.0]])
    _, _, other = selected_logprobs(z, torch.tensor([0]), torch.tensor([[0]]))
    wanted = z.double().log_softmax(-1)[:, 1:].logsumexp(-1)
    torch.testing.assert_close(other.double(), wanted, rtol=1e-6, atol=0)


# -- chunked_terms


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return out


def head_of(v: int = V, dtype: torch.dtype = torch.float64) -> nn.Linear:
    torch.manual_seed(2)
    return nn.Linear(H, v, dtype=dtype)


def terms(n: int, v: int = V) -> Callable[[Tensor, int, int], Tensor]:
    _, labels, ids = inputs(n, v)

    def of(logits: Tensor, start: int, stop: int) -> Tensor:
        own, log_s, other = selected_logprobs(logits, labels[start:stop], ids[start:stop])
        return torch.stack([-own.sum(), (log_s.square().sum(-1) + other).sum()]) / n

    return of


def hidden_of(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(n, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


@settings(max_examples=25, deadline=None)
@given(
    st.integers(4, 30), st.lists(st.integers(1, 29), max_size=5), st.sampled_from([1.0, -3.0, 0.01])
)
def test_chunks_give_the_loss_terms_and_gradients_of_the_whole(
    n: int, edges: list[int], scale: float
) -> None:
    hidden, head = hidden_of(n), head_of()
    cuts = sorted({0, n, *(e for e in edges if e < n)})
    whole = terms(n)(head(hidden), 0, n)
    loss, found = chunked_terms(hidden, head, terms(n), MIX, cuts)
    torch.testing.assert_close(found, whole.detach())
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
    hidden, head = hidden_of(N), head_of()

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return chunked_terms(hidden, head, terms(N), MIX, [0, 3, N])[0]

    # gradcheck perturbs the parameters in place: the head sees it.
    assert torch.autograd.gradcheck(loss, (hidden, head.weight, head.bias))


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, head = hidden_of(N), head_of()
    head.bias.requires_grad_(False)
    chunked_terms(hidden.detach(), head, terms(N), MIX, [0, 4, N])[0].backward()
    assert head.weight.grad is not None
    assert head.bias.grad is None
    assert hidden.grad is None


def test_no_tensor_has_the_size_of_all_logits_and_gradients_alone_are_kept() -> None:
    n, v, t = 640, 512, 64
    hidden, head = hidden_of(n, torch.float32), head_of(v, torch.float32)
    of, cuts = terms(n, v), list(range(0, n + 1, t))
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        chunked_terms(hidden, head, of, MIX.float(), cuts)[0].backward()
    assert largest.elements == t * v
    assert max(kept[-3:]) <= max(v * H, n * H)  # the last ones: the function's own


def test_a_float8_head_is_a_head() -> None:
    n = 256
    hidden, plain_head = hidden_of(n, torch.float32), head_of(128, torch.float32)
    head = Float8Linear.from_float(plain_head, BlockScaling(gemm="float32"))
    whole = (MIX.float() * terms(n, 128)(head(hidden), 0, n)).sum()
    loss, _ = chunked_terms(hidden, head, terms(n, 128), MIX.float(), [0, 128, n])
    torch.testing.assert_close(loss, whole)
    leaves = [hidden, *head.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(whole, leaves), rtol=1e-4, atol=1e-6
    )


# -- cut_between


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 20))
def test_cuts_cover_everything_and_part_nothing_that_belongs_together(
    inside: list[bool], chunk: int
) -> None:
    inside[0] = False
    cuts = cut_between(torch.tensor(inside), chunk)
    assert cuts[0] == 0
    assert cuts[-1] == len(inside)
    assert all(a < b for a, b in pairwise(cuts))
    assert not any(inside[cut] for cut in cuts[1:-1])
    for a, b in pairwise(cuts):  # longer than asked only where nothing can be cut
        assert b - a <= chunk or all(inside[a + 1 : b])
    for a, _, c in zip(cuts, cuts[1:], cuts[2:], strict=False):  # and never shorter for nothing
        assert c - a > chunk
