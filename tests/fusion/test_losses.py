from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fusion.losses import alm, infifusion, span_kl, standardize

N, V, C, S, K = 4, 9, 3, 2, 5


def logits(seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, V, generator=generator, dtype=torch.float64) * scale


def target(seed: int = 1) -> tuple[Tensor, Tensor]:
    probs, ids = logits(seed).softmax(-1).topk(C, dim=-1)
    ids[0, 2] = -1  # a row that names fewer; its third probability must not count
    return ids, probs


def ranks(seed: int) -> Tensor:
    top = logits(seed).topk(K, dim=-1).values
    return standardize(top).softmax(-1)[:, None].repeat(1, S, 1)


def test_span_kl_is_the_kl_of_the_partition_into_named_ids_and_other() -> None:
    ids, probs = target()
    student = logits().softmax(-1)
    found = span_kl(logits().log_softmax(-1), ids, probs)
    for n in range(N):
        named = [c for c in range(C) if ids[n, c] >= 0]
        p = [float(probs[n, c]) for c in named]
        s = [float(student[n, ids[n, c]]) for c in named]
        p, s = [*p, 1 - sum(p)], [*s, 1 - sum(s)]
        wanted = sum(a * float(torch.tensor(a / b).log()) for a, b in zip(p, s, strict=True))
        assert float(found[n]) == pytest.approx(wanted, abs=1e-6)


def test_gradients_agree_with_finite_differences() -> None:
    ids, probs = target()
    mask = torch.tensor([[True, False]] * N)
    student = logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: span_kl(z.log_softmax(-1), ids, probs), student)
    assert torch.autograd.gradcheck(lambda z: infifusion(z, ranks(3), mask), student)
    chunk = torch.tensor([-0.1, -1.0, -4.0, -9.0], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([-0.5, -0.2, -8.0, -3.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: alm(x, teacher), chunk)


def test_a_student_with_permuted_ids_costs_span_kl_and_costs_infifusion_nothing() -> None:
    teacher = logits(7)
    student = teacher.roll(1, dims=-1)
    probs, ids = teacher.softmax(-1).topk(C, dim=-1)
    mask = torch.ones(N, S, dtype=torch.bool)
    assert (span_kl(student.log_softmax(-1), ids, probs) > 0.5).all()
    assert infifusion(student, ranks(7), mask).abs().max() < 1e-9


def test_a_flatter_teacher_costs_span_kl_and_costs_infifusion_nothing() -> None:
    teacher = logits(7)
    probs, ids = (teacher * 0.3).softmax(-1).topk(C, dim=-1)
    mask = torch.ones(N, S, dtype=torch.bool)
    flat = standardize((teacher * 0.3).topk(K, dim=-1).values).softmax(-1)[:, None].repeat(1, S, 1)
    assert (span_kl(teacher.log_softmax(-1), ids, probs) > 0.01).all()
    assert infifusion(teacher, flat, mask).abs().max() < 1e-9


def test_the_teacher_itself_costs_nothing_with_all_ids_and_with_a_tail() -> None:
    student = logits(7).log_softmax(-1)
    for kept in (1, C, V):
        probs, ids = student.exp().topk(kept, dim=-1)
        assert span_kl(student, ids, probs).abs().max() < 1e-5
    chunk = torch.tensor([-0.1, -3.0], dtype=torch.float64)
    assert alm(chunk, chunk).abs().max() < 1e-9


def test_span_kl_is_never_negative_and_coarser_partitions_tell_less() -> None:
    student = logits(0).log_softmax(-1)
    costs = []
    for kept in (1, 3, 6, V):
        probs, ids = logits(1).softmax(-1).topk(kept, dim=-1)
        costs.append(span_kl(student, ids, probs))
    for coarse, fine in pairwise(costs):
        assert (coarse > -1e-9).all()
        assert (coarse <= fine + 1e-6).all()


def test_unnamed_ids_are_held_down_as_one_and_keep_their_proportions() -> None:
    # Only OTHER as a whole is taught, so the gradient on unnamed ids is in proportion to them.
    student = logits().requires_grad_()
    ids, probs = target()
    span_kl(student.log_softmax(-1), ids, probs)[1].backward()
    assert student.grad is not None
    unnamed = [v for v in range(V) if v not in ids[1].tolist()]
    ratio = student.grad[1, unnamed] / student.softmax(-1)[1, unnamed]
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio))
    assert student.grad[[0, 2, 3]].abs().max() == 0


def test_a_confident_student_on_an_impossible_target_keeps_finite_gradients() -> None:
    student = torch.full((1, V), -80.0)
    student[0, 0] = 80.0
    student.requires_grad_()
    loss = span_kl(student.log_softmax(-1), torch.tensor([[0, 1]]), torch.tensor([[0.0, 0.5]]))
    (loss.sum() + alm(torch.zeros(1), torch.tensor([-2.0])).sum()).backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_infifusion_skips_teachers_without_a_row_and_still_divides_by_all() -> None:
    both = infifusion(logits(), ranks(3), torch.ones(N, S, dtype=torch.bool))
    one = infifusion(logits(), ranks(3), torch.tensor([[True, False]] * N))
    none = logits().requires_grad_()
    infifusion(none, ranks(3), torch.zeros(N, S, dtype=torch.bool)).sum().backward()
    assert torch.allclose(one * 2, both)
    assert none.grad is not None
    assert none.grad.abs().max() == 0


def test_standardize_forgets_offset_and_temperature() -> None:
    assert torch.allclose(standardize(logits()), standardize(logits() * 0.3 + 5))
    assert torch.allclose(standardize(logits()).std(-1, unbiased=False), torch.ones(N).double())


def test_equal_logits_keep_a_finite_gradient() -> None:
    student = torch.zeros(N, V, dtype=torch.float64, requires_grad=True)
    infifusion(student, ranks(3), torch.ones(N, S, dtype=torch.bool)).sum().backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
