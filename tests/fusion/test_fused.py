"""Selected log-probabilities equal the plain computation; cuts part nothing that is one."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion.fused import cut_between, selected_logprobs

N, V, C = 7, 12, 3


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
