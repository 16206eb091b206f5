"""Laws of the losses: what costs nothing, what must cost something, and where gradients go."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fusion.fused import selected_logprobs
from fusion.losses import (
    alm,
    cross_entropy,
    features,
    gold,
    infifusion,
    projected_kl,
    rank_graph,
    span_kl,
    standardize,
    uld,
)

N, V, C, S, K = 4, 9, 3, 2, 5
MASK = torch.ones(N, S, dtype=torch.bool)
SIZES = torch.full((N,), V)
NONE = torch.zeros(N)


def logits(seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, V, generator=generator, dtype=torch.float64) * scale


def top(z: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    probs, ids = z.softmax(-1).topk(kept, dim=-1)
    return ids, probs


def span(z: Tensor, ids: Tensor, probs: Tensor) -> Tensor:
    labels = torch.zeros(len(z), dtype=torch.int64)
    _, log_s, log_other = selected_logprobs(z, labels, ids)
    return span_kl(log_s, log_other, probs)


def target(seed: int = 1) -> tuple[Tensor, Tensor]:
    ids, probs = top(logits(seed), C)
    ids[0, 2], probs[0, 2] = -1, 0  # a row that names fewer
    return ids, probs


def ranks(z: Tensor) -> Tensor:
    return standardize(z.topk(K, dim=-1).values).softmax(-1)[:, None].repeat(1, S, 1)


def uld_of(student: Tensor, teacher: Tensor) -> Tensor:
    return uld(student, top(teacher, V)[1], NONE, SIZES)


# -- span_kl


def test_span_kl_is_the_kl_of_the_partition_into_named_ids_and_other() -> None:
    ids, probs = target()
    student = logits().softmax(-1)
    found = span(logits(), ids, probs)
    for n in range(N):
        named = [c for c in range(C) if ids[n, c] >= 0]
        p = [float(probs[n, c]) for c in named]
        s = [float(student[n, ids[n, c]]) for c in named]
        p, s = [*p, 1 - sum(p)], [*s, 1 - sum(s)]
        wanted = sum(a * math.log(a / b) for a, b in zip(p, s, strict=True))
        assert float(found[n]) == pytest.approx(wanted, abs=1e-12)


def test_span_kl_is_never_negative_and_coarser_partitions_tell_less() -> None:
    costs = [span(logits(), *top(logits(1), kept)) for kept in (1, 3, 6, V)]
    for coarse, fine in pairwise(costs):
        assert (coarse > -1e-9).all()
        assert (coarse <= fine + 1e-6).all()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 1000), st.integers(1, V), st.floats(-50, 50), st.sampled_from([0.1, 1.0, 8.0])
)
def test_the_teacher_itself_and_any_constant_cost_nothing(
    seed: int, kept: int, constant: float, scale: float
) -> None:
    ids, probs = top(logits(seed, scale), kept)
    moved = logits(seed, scale).requires_grad_()
    cost = span(moved + constant, ids, probs)
    assert cost.abs().max() < 1e-5
    cost.sum().backward()
    assert moved.grad is not None
    assert moved.grad.abs().max() < 1e-5


def test_a_confident_student_still_feels_what_is_left() -> None:
    # In fp32, 1 - sum would be 0 here: no digits, no gradient. 2e-9 is what the others have.
    student = torch.tensor([[20.0, 0.0]]).requires_grad_()
    span(student, torch.tensor([[0]]), torch.tensor([[0.5]])).sum().backward()
    left = math.exp(-20) / (1 + math.exp(-20))
    wanted = 0.5 * math.log(0.5) - 0.5 * math.log1p(-left) + 0.5 * math.log(0.5 / left)
    found = span(student, torch.tensor([[0]]), torch.tensor([[0.5]]))
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.5]]), rtol=1e-5, atol=1e-7)


def test_unnamed_ids_are_held_down_as_one_and_keep_their_proportions() -> None:
    student = logits().requires_grad_()
    ids, probs = top(logits(1), C)
    span(student, ids, probs).sum().backward()
    assert student.grad is not None
    slope = student.grad / student.detach().softmax(-1)
    unnamed = torch.ones_like(slope, dtype=torch.bool).scatter(-1, ids, False)
    for n in range(N):
        found = slope[n][unnamed[n]]
        assert (found - found[0]).abs().max() < 1e-9


def test_ids_the_teacher_does_not_name_are_not_suppressed_when_it_likes_them_as_one() -> None:
    # Not GOLD's trap: the teacher gives OTHER more than the student does, so all of it rises.
    student = torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64).requires_grad_()
    span(student, torch.tensor([[0, 1]]), torch.tensor([[0.2, 0.1]])).sum().backward()
    assert student.grad is not None
    assert (student.grad[0, 2:] < 0).all()  # descent lifts them
    assert (student.grad[0, :2] > 0).all()


def test_counts_of_samples_teach_in_the_mean_what_the_whole_distribution_does() -> None:
    # RS-KD: span_kl with rows that sum to 1 is cross-entropy against the counts.
    teacher, student = logits(1)[:1], logits()[:1].requires_grad_()
    (wanted,) = torch.autograd.grad(
        span(student, torch.arange(V)[None], teacher.softmax(-1)).sum(), student
    )
    generator, draws, rows = torch.Generator().manual_seed(0), 5, 40_000
    drawn = torch.multinomial(
        teacher.softmax(-1)[0], rows * draws, replacement=True, generator=generator
    )
    counts = torch.zeros(rows, V, dtype=torch.float64).scatter_add_(
        1, drawn.view(rows, draws), torch.ones(rows, draws, dtype=torch.float64)
    )
    probs, ids = (counts / draws).topk(draws, dim=-1)
    ids = ids.where(probs > 0, -1)
    cost = span(student.expand(rows, V), ids, probs).mean()
    (found,) = torch.autograd.grad(cost, student)
    assert (found - wanted).abs().max() < 0.01
    # The biased way, keeping the likeliest and renormalising, teaches something else.
    ids, probs = top(teacher, 2)
    (biased,) = torch.autograd.grad(
        span(student, ids, probs / probs.sum(-1, keepdim=True)).sum(), student
    )
    assert (biased - wanted).abs().max() > 0.03


# -- alm


def test_alm_costs_nothing_only_where_both_agree() -> None:
    chunk = torch.tensor([-1e-9, -0.1, -3.0, -40.0], dtype=torch.float64)
    for temperature in (1.0, 10.0, math.inf):
        assert alm(chunk, chunk, temperature).abs().max() < 1e-9
        assert (alm(chunk[1:3] * 1.5, chunk[1:3], temperature) > 1e-4).all()


def test_alm_is_the_binary_kl_and_goes_to_the_papers_limit() -> None:
    student = torch.tensor([-0.1, -1.0, -4.0], dtype=torch.float64)
    teacher = torch.tensor([-0.5, -0.2, -8.0], dtype=torch.float64)
    p, s = teacher.exp(), student.exp()
    wanted = p * (p / s).log() + (1 - p) * ((1 - p) / (1 - s)).log()
    torch.testing.assert_close(alm(student, teacher), wanted)
    torch.testing.assert_close(
        alm(student, teacher, 1e5), alm(student, teacher, math.inf), rtol=1e-3, atol=1e-4
    )


# -- what sorting cannot see


def test_a_student_with_permuted_ids_costs_ours_and_costs_what_sorts_nothing() -> None:
    teacher = logits(7)
    student = teacher.roll(1, dims=-1)
    assert (span(student, *top(teacher, C)) > 0.5).all()
    assert infifusion(student, ranks(teacher), MASK).abs().max() < 1e-9
    assert uld_of(student, teacher).abs().max() < 1e-9
    sorted_K = standardize(student.topk(K, dim=-1).values)
    assert rank_graph(sorted_K, features(ranks(teacher)[:, 0]), MASK[:, 0]) < 1e-9


def test_a_flatter_teacher_costs_ours_and_costs_z_scores_nothing() -> None:
    teacher = logits(7)
    assert (span(teacher, *top(teacher * 0.3, C)) > 0.01).all()
    assert infifusion(teacher, ranks(teacher * 0.3), MASK).abs().max() < 1e-9
    assert (uld_of(teacher, teacher * 0.3) > 0.1).all()


def test_infifusion_counts_only_teachers_that_are_there_and_divides_by_all() -> None:
    both = infifusion(logits(0), ranks(logits(3)), MASK)
    one = infifusion(logits(0), ranks(logits(3)), torch.tensor([[True, False]] * N))
    torch.testing.assert_close(one, both / 2)


@pytest.mark.parametrize("size", [V - 3, V, V + 4])
def test_uld_pads_the_shorter_vocabulary_and_spreads_what_was_not_shipped(size: int) -> None:
    probs = torch.tensor([[0.5, 0.2, 0.1]] * N, dtype=torch.float64)
    each = torch.full((N,), 0.2 / (size - 3), dtype=torch.float64)
    teacher = torch.cat([probs, each[:, None].repeat(1, size - 3)], -1)
    student = logits().softmax(-1).sort(-1, descending=True).values
    width = max(V, size)
    pad = torch.nn.functional.pad
    wanted = (pad(student, (0, width - V)) - pad(teacher, (0, width - size))).abs().sum(-1)
    found = uld(logits(), probs, each, torch.full((N,), size))
    torch.testing.assert_close(found, wanted)
    assert not uld(logits(), probs, each, torch.zeros(N, dtype=torch.int64)).any()


def test_standardize_forgets_offset_and_temperature() -> None:
    assert torch.allclose(standardize(logits()), standardize(logits() * 0.3 + 5))
    assert torch.allclose(standardize(logits()).std(-1, unbiased=False), torch.ones(N).double())
    torch.testing.assert_close(features(standardize(logits()).softmax(-1)), standardize(logits()))


# -- GOLD and P-KL


def test_gold_pushes_ids_down_that_the_teacher_has_no_word_for_and_ours_does_not() -> None:
    # Student ids 0 and 1 are the teacher's; 2..4 are numerals that the teacher cuts otherwise.
    matched = torch.tensor([True, True, False, False, False])
    ids, probs = torch.tensor([[0, 1]]), torch.tensor([[0.2, 0.1]], dtype=torch.float64)
    student = torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.0]], dtype=torch.float64).requires_grad_()
    for beta in (0.0, 0.5):
        cost = gold(student.softmax(-1), matched, ids, probs, probs[:, :0], beta=beta)[:, 0]
        (grad,) = torch.autograd.grad(cost.sum(), student)
        share = student.detach().softmax(-1)[0, 2:]
        if beta == 0:  # exactly p_S times the teacher's common mass
            torch.testing.assert_close(grad[0, 2:], share * 0.3)
        ours = torch.autograd.grad(span(student, ids, probs).sum(), student)[0]
        assert (ours[0, 2:] < 0).all()
    # A fixed point of ours, where teacher and student agree, is none of GOLD's.
    ids, probs = torch.tensor([[0, 1]]), student.detach().softmax(-1)[:, :2]
    cost = gold(student.softmax(-1), matched, ids, probs, probs[:, :0], beta=0.0)[:, 0]
    (grad,) = torch.autograd.grad(cost.sum(), student)
    assert (grad[0, 2:] > 0.01).all()
    (ours,) = torch.autograd.grad(span(student, ids, probs).sum(), student)
    assert ours.abs().max() < 1e-9


def test_gold_of_one_vocabulary_and_equal_distributions_costs_nothing() -> None:
    ids, probs = top(logits(7), V)
    matched = torch.ones(V, dtype=torch.bool)
    assert gold(logits(7).softmax(-1), matched, ids, probs, probs * 0).abs().max() < 1e-9
    assert (gold(logits(0).softmax(-1), matched, ids, probs, probs * 0)[:, 0] > 0.01).all()


@pytest.mark.parametrize("beta", [0.2, 0.5])
def test_golds_common_half_is_the_generalised_jensen_shannon_divergence(beta: float) -> None:
    ids, probs = top(logits(7), V)
    p, q = probs, logits(0).softmax(-1).gather(-1, ids)
    mixed = beta * p + (1 - beta) * q
    wanted = beta * p * (p / mixed).log() + (1 - beta) * q * (q / mixed).log()
    matched = torch.ones(V, dtype=torch.bool)
    found = gold(logits(0).softmax(-1), matched, ids, probs, probs * 0, beta=beta)
    torch.testing.assert_close(found[:, 0], wanted.sum(-1))


def test_gold_compares_the_rest_by_rank() -> None:
    matched = torch.zeros(V, dtype=torch.bool)
    rest = logits(7).softmax(-1)
    none = torch.full((N, 1), -1)
    student = logits(7).roll(2, dims=-1).softmax(-1)
    assert gold(student, matched, none, rest[:, :1], rest)[:, 1].abs().max() < 1e-9


def projection() -> Tensor:
    dense = torch.zeros(V + 2, V, dtype=torch.float64)
    dense[torch.arange(V), torch.arange(V)] = 1.0
    dense[4, 4], dense[V, 4] = 0.6, 0.4  # a student id that the teacher writes in two pieces
    return dense.to_sparse()


def test_p_kl_compares_in_the_teachers_ids() -> None:
    mass = logits().softmax(-1) @ projection().to_dense().T
    ids = torch.tensor([[V, 0, -1], [4, 1, 2], [8, V, 3], [5, 6, 7]])
    probs = torch.tensor([[0.5, 0.2, 0.0]] * N, dtype=torch.float64)
    wanted = (probs[:, :2] * (probs[:, :2] / mass.gather(-1, ids[:, :2])).log()).sum(-1)
    torch.testing.assert_close(projected_kl(logits(), projection(), ids, probs), wanted)


# -- all of them


def test_gradients_agree_with_finite_differences() -> None:
    ids, probs = target()
    z, check = logits().requires_grad_(), torch.autograd.gradcheck
    rows, each = torch.ones(N, dtype=torch.bool), torch.full((N,), 0.01, dtype=torch.float64)
    matched = torch.arange(V) % 3 > 0

    def own(z: Tensor) -> Tensor:
        return selected_logprobs(z, ids[:, 0], ids)[1]

    def graph(z: Tensor) -> Tensor:
        return rank_graph(
            standardize(z.topk(K, dim=-1).values), features(ranks(logits(3))[:, 0]), rows
        )

    assert check(lambda z: span(z, ids, probs), z)
    assert check(lambda z: cross_entropy(own(z), probs), z)
    assert check(lambda z: infifusion(z, ranks(logits(3)), MASK), z)
    assert check(graph, z)
    assert check(lambda z: uld(z, probs, each, SIZES), z)
    assert check(lambda z: projected_kl(z, projection(), ids, probs), z)
    for beta in (0.0, 0.5, 1.0):
        assert check(lambda z, b=beta: gold(z.softmax(-1), matched, ids, probs, probs, beta=b), z)
    chunk = torch.tensor([-0.1, -1.0, -4.0, -9.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.5, -0.2, -8.0, -3.0], dtype=torch.float64)
    for temperature in (1.0, 100.0, math.inf):
        assert check(lambda x, t=temperature: alm(x, teacher, t), chunk)


@pytest.mark.parametrize("constant", [-30.0, 300.0])
def test_a_constant_added_to_the_logits_changes_nothing(constant: float) -> None:
    ids, probs = target()
    each = torch.full((N,), 0.01, dtype=torch.float64)
    for loss in (
        lambda z: span(z, ids, probs),
        lambda z: infifusion(z, ranks(logits(3)), MASK),
        lambda z: uld(z, probs, each, SIZES),
        lambda z: projected_kl(z, projection(), ids, probs),
    ):
        torch.testing.assert_close(loss(logits() + constant), loss(logits()))


def test_extreme_inputs_keep_finite_gradients() -> None:
    sure = torch.full((1, V), -80.0)
    sure[0, 0] = 80.0
    sure.requires_grad_()
    flat = torch.zeros(N, V, dtype=torch.float64, requires_grad=True)
    chunk = torch.zeros(1, requires_grad=True)
    cost = span(sure, torch.tensor([[0, 1]]), torch.tensor([[0.0, 0.5]])).sum()
    cost = cost + infifusion(flat, ranks(logits(3)), MASK).sum()
    cost = cost + alm(chunk, torch.tensor([-2.0])).sum()
    ids, matched = torch.tensor([[0, 1]]), torch.arange(V) < 2
    cost = cost + gold(sure.softmax(-1), matched, ids, torch.tensor([[0.0, 0.5]]), NONE[None]).sum()
    for grad in torch.autograd.grad(cost, (sure, flat, chunk)):
        assert grad.isfinite().all()
