from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fp8.train import TrainConfig, causal_lm_loss, packed_batches, train
from fusion.merge import MergeError
from fusion.models import ModelSpec, build_model
from fusion.proximal import proximal

SPEC = ModelSpec(architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=300)
"""Its head is its embedding."""


def zero(model: nn.Module, _batch: Any) -> Tensor:
    return 0 * next(model.parameters()).sum()


def test_the_term_is_half_mu_times_the_squared_distance_tied_weights_once() -> None:
    model, pivot = build_model(SPEC, 1), build_model(SPEC, 0)
    reference = dict(pivot.named_parameters())
    loss = proximal(zero, reference, 0.3)
    found, metrics = loss(model, None)
    total = sum(
        float((p - reference[n]).detach().double().square().sum())
        for n, p in model.named_parameters()
    )
    assert float(found.detach()) == pytest.approx(0.15 * total, rel=1e-5)
    assert metrics["proximal"] == pytest.approx(0.15 * total, rel=1e-5)
    found.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        wanted = 0.3 * (parameter - reference[name]).detach()
        assert torch.allclose(parameter.grad, wanted, atol=1e-6)


def test_it_adds_to_the_loss_and_its_metrics_and_is_absent_at_zero() -> None:
    model = build_model(SPEC, 1)
    reference = dict(build_model(SPEC, 0).named_parameters())
    assert proximal(zero, reference, 0.0) is zero

    def told(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, float]]:
        return zero(model, batch) + 2.0, {"kl": 1.0}

    found, metrics = proximal(told, reference, 1.0)(model, None)
    assert metrics["kl"] == 1.0
    assert float(found.detach()) == pytest.approx(2.0 + metrics["proximal"])


def test_the_reference_stays_where_it_was_taken() -> None:
    model = build_model(SPEC, 0)
    loss = proximal(zero, dict(model.named_parameters()), 1.0)
    assert float(loss(model, None)[0].detach()) == 0
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    assert float(loss(model, None)[0].detach()) > 0


def test_a_run_with_a_larger_mu_ends_nearer_the_pivot() -> None:
    batches = packed_batches(list(range(300)) * 3, batch_size=4, seq_len=16, seed=0)
    distances = []
    for mu in (0.0, 1.0, 30.0):
        model = build_model(SPEC, 0)
        reference = {n: p.detach().clone() for n, p in model.named_parameters()}
        config = TrainConfig(steps=12, lr=1e-3, warmup_steps=1, decay_steps=1, seed=0)
        train(model, batches, proximal(causal_lm_loss, reference, mu), config)
        moved = ((p - reference[n]).detach().square().sum() for n, p in model.named_parameters())
        distances.append(float(sum(moved)))
    assert distances[0] > distances[1] > distances[2]


def test_pieces_of_a_batch_weighted_by_tokens_are_the_whole_batch() -> None:
    model, reference = build_model(SPEC, 1), dict(build_model(SPEC, 0).named_parameters())
    loss = proximal(causal_lm_loss, reference, 0.1)
    batch = torch.arange(6 * 9).reshape(6, 9)
    whole = float(loss(model, batch)[0].detach())
    parts = [float(loss(model, part)[0].detach()) for part in batch.tensor_split(3)]
    assert sum(parts) / 3 == pytest.approx(whole, rel=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    model = build_model(SPEC, 0)
    for mu in (-1.0, float("nan"), float("inf")):
        with pytest.raises(MergeError, match="mu is"):
            proximal(zero, {}, mu)
    with pytest.raises(MergeError, match="reference has no"):
        proximal(zero, {}, 1.0)(model, None)
