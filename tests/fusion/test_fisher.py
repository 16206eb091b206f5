import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fp8.train import causal_lm_loss
from fusion.fisher import diagonal_fisher
from fusion.merge import MergeError, MergeSettings, merge, subtract
from fusion.models import ModelSpec, build_model, parameter_arrays

SPEC = ModelSpec(architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=300)
BATCHES = [
    torch.randint(0, 300, (rows, 9), generator=torch.Generator().manual_seed(rows))
    for rows in (1, 3)
]


class Point(nn.Module):
    """A model that is a point, and believes its data lie around it with known spread."""

    def __init__(self, at: list[float]) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(at))


def distance(sharpness: Tensor) -> "object":
    """Mean over rows of half h (x - at)^2: minus the log of a Gaussian, but for a constant."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return (0.5 * sharpness * (batch - model.at).square()).sum(-1).mean()

    return loss


def test_on_a_quadratic_fisher_merging_finds_the_joint_minimum() -> None:
    base, bests = [0.0, 0.0, 0.0], {"a": [1.0, -2.0, 0.5], "b": [3.0, 1.0, 0.25]}
    sharp = {"a": torch.tensor([4.0, 1.0, 0.25]), "b": torch.tensor([1.0, 9.0, 0.25])}
    tuned, fisher = {}, {}
    for name, best in bests.items():
        model, spread = Point(best), sharp[name].rsqrt()
        # Two points a standard deviation away on either side have the Gaussian's second moment.
        data = torch.stack([model.at.detach() + spread, model.at.detach() - spread])
        fisher[name] = diagonal_fisher(model, [data], distance(sharp[name]))
        assert fisher[name]["at"] == pytest.approx(sharp[name].numpy(), rel=1e-5)
        tuned[name] = {"at": np.asarray(best, np.float32)}
    start = {"at": np.asarray(base, np.float32)}
    deltas = {name: subtract(model, start) for name, model in tuned.items()}
    found = merge(start, deltas, MergeSettings(method="fisher"), fisher=fisher)
    total = sharp["a"] + sharp["b"]
    joint = (sharp["a"] * torch.tensor(bests["a"]) + sharp["b"] * torch.tensor(bests["b"])) / total
    assert found["at"] == pytest.approx(joint.numpy(), rel=1e-5)


def test_it_is_the_mean_over_sequences_of_the_squared_gradient() -> None:
    model = build_model(SPEC, 0)
    wanted = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    rows = [row for batch in BATCHES for row in batch]
    for row in rows:
        model.zero_grad()
        causal_lm_loss(model, row[None]).backward()
        for name, parameter in model.named_parameters():
            wanted[name] += parameter.grad.square() / len(rows)
    model.zero_grad()
    found = diagonal_fisher(model, BATCHES, causal_lm_loss)
    assert found.keys() == parameter_arrays(model).keys()
    for name, value in found.items():
        assert value == pytest.approx(wanted[name].numpy(), rel=1e-4, abs=1e-12)
        assert value.dtype == np.float32
        assert value.min() >= 0


def test_how_rows_are_batched_changes_nothing_and_the_model_is_left_alone() -> None:
    model = build_model(SPEC, 0).train()
    before = parameter_arrays(model)
    together = diagonal_fisher(model, [torch.cat(BATCHES)], causal_lm_loss)
    mapped = diagonal_fisher(model, ({"input_ids": batch} for batch in BATCHES), causal_lm_loss)
    for name in together:
        assert np.allclose(together[name], mapped[name], rtol=1e-4, atol=1e-12)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(np.array_equal(before[n], a) for n, a in parameter_arrays(model).items())


def test_frozen_parameters_have_none() -> None:
    model = build_model(SPEC, 0)
    frozen = next(iter(dict(model.named_parameters())))
    model.get_parameter(frozen).requires_grad_(False)
    found = diagonal_fisher(model, BATCHES[:1], causal_lm_loss)
    assert not found[frozen].any()
    assert sum(value.any() for value in found.values()) > 1


def test_no_text_and_no_number_are_refused() -> None:
    model = build_model(SPEC, 0)
    for batches in ([], [torch.zeros((2, 1), dtype=torch.int64)]):
        with pytest.raises(MergeError, match="no sequence"):
            diagonal_fisher(model, batches, causal_lm_loss)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(MergeError, match="not finite"):
        diagonal_fisher(model, BATCHES, causal_lm_loss)
