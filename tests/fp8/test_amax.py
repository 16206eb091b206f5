"""Laws of the memory that delayed scaling scales by."""

import math

import pytest
import torch
from torch import Tensor

from fp8.amax import GRAD_OUTPUT, INPUT, AmaxHistory
from fp8.epoch import invalidate_weight_caches
from fp8.quantize import dequantize, quantize
from fp8.recipe import DelayedScaling

SPEC = DelayedScaling().input


def full(value: float) -> Tensor:
    return torch.tensor([value, -value / 2, 0.0])


def train(history: AmaxHistory, *steps: float) -> None:
    for value in steps:
        history.scale_by(INPUT, full(value), record=True)
        invalidate_weight_caches()


def test_without_a_past_the_tensor_is_scaled_by_its_own() -> None:
    history = AmaxHistory(4)
    for value in (3.0, 7.0, 2.0):  # micro-batches of the first step
        assert history.scale_by(INPUT, full(value), record=True) == value


def test_within_a_step_all_are_scaled_alike() -> None:
    history = AmaxHistory(4)
    train(history, 3.0)
    for value in (5.0, 1.0, 9.0, 5.0):
        assert history.scale_by(INPUT, full(value), record=True) == 3.0


@pytest.mark.parametrize("first", [True, False], ids=["kept", "without gradients"])
def test_a_recomputed_activation_gets_the_scale_of_its_first_pass(first: bool) -> None:
    history = AmaxHistory(4)
    train(history, 3.0, 6.0)
    # Reentrant checkpointing runs the first pass without gradients, so nothing is recorded then.
    before = history.scale_by(INPUT, full(5.0), record=first)
    assert history.scale_by(INPUT, full(5.0), record=True) == before == 6.0


def test_the_page_turns_once_per_optimizer_step() -> None:
    history = AmaxHistory(3)
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    for values in ((8.0, 2.0), (1.0, 4.0), (0.5,)):
        for value in values:
            history.scale_by(INPUT, full(value), record=True)
        parameter.grad = torch.ones(1)
        optimizer.step()
    history.scale_by(INPUT, full(1.0), record=True)
    assert history.state()["amax_past"][INPUT].tolist() == [0.5, 4.0, 8.0]


def test_the_scale_is_the_largest_of_the_last_steps_and_no_more() -> None:
    history = AmaxHistory(2)
    train(history, 8.0, 2.0)
    assert history.scale_by(INPUT, full(1.0), record=False) == 8.0
    train(history, 1.0)
    assert history.scale_by(INPUT, full(1.0), record=False) == 2.0
    train(history, 1.0)
    assert history.scale_by(INPUT, full(9.0), record=False) == 1.0


def test_input_and_gradient_are_remembered_apart() -> None:
    history = AmaxHistory(4)
    history.scale_by(INPUT, full(3.0), record=True)
    history.scale_by(GRAD_OUTPUT, full(1e-4), record=True)
    invalidate_weight_caches()
    assert history.scale_by(INPUT, full(1.0), record=True) == 3.0
    assert history.scale_by(GRAD_OUTPUT, full(1.0), record=True) == torch.tensor(1e-4)


def test_what_is_not_recorded_leaves_no_trace() -> None:
    history = AmaxHistory(4)
    train(history, 3.0)
    before = {name: tensor.clone() for name, tensor in history.state().items()}
    for _ in range(6):  # another model's steps, and evaluations between
        invalidate_weight_caches()
        assert history.scale_by(INPUT, full(100.0), record=False) == 3.0
    for name, tensor in history.state().items():
        assert torch.equal(tensor, before[name])


def test_values_above_the_past_are_clipped() -> None:
    history = AmaxHistory(4)
    train(history, 2.0)
    x = torch.tensor([[8.0, -8.0, 2.0, 1.0]])
    q = quantize(x, SPEC, amax=history.scale_by(INPUT, x, record=True))
    assert torch.allclose(dequantize(q), torch.tensor([[2.0, -2.0, 2.0, 1.0]]))
    assert bool(q.codes.float().isfinite().all())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_non_finite_value_poisons_the_result_and_not_the_history(
    bad: float, steps_before: int
) -> None:
    history = AmaxHistory(4)
    train(history, *[3.0] * steps_before)
    x = torch.tensor([[1.0, bad, 2.0]])
    amax = history.scale_by(INPUT, x, record=True)
    assert bool(amax.isnan())
    assert bool(dequantize(quantize(x, SPEC, amax=amax)).isnan().all())
    invalidate_weight_caches()
    wanted = 3.0 if steps_before else 5.0
    assert history.scale_by(INPUT, full(5.0), record=True) == wanted


def test_empty_and_low_precision_tensors_are_fine() -> None:
    history = AmaxHistory(4)
    assert history.scale_by(INPUT, torch.empty(0, 8), record=True) == 0.0
    amax = history.scale_by(INPUT, full(3.0).bfloat16(), record=True)
    assert amax == 3.0
    assert amax.dtype == torch.float32
    train(history, 0.0)
    assert history.scale_by(INPUT, full(1.0), record=True) == 3.0


@pytest.mark.parametrize("due", [False, True], ids=["mid-step", "after the step"])
def test_a_resumed_history_goes_on_bit_for_bit(due: bool) -> None:
    def go_on(history: AmaxHistory) -> list[Tensor]:
        found = []
        for value in (0.3, 0.7, 5.0, 0.1, 0.2):
            found.append(history.scale_by(INPUT, full(value), record=True))
            found.append(history.scale_by(GRAD_OUTPUT, full(value / 7), record=True))
            invalidate_weight_caches()
        return [*found, *history.state().values()]

    history, resumed = AmaxHistory(3), AmaxHistory(3)
    train(history, 2.0, 1.0)
    history.scale_by(INPUT, full(6.0), record=True)
    if due:
        invalidate_weight_caches()
    state = history.state()
    wanted = go_on(history)
    resumed.load(state)
    for found, value in zip(go_on(resumed), wanted, strict=True):
        assert torch.equal(found, value)


def test_a_saved_state_does_not_change_afterwards() -> None:
    history = AmaxHistory(3)
    train(history, 2.0)
    history.scale_by(INPUT, full(3.0), record=True)
    state = history.state()
    before = {name: tensor.clone() for name, tensor in state.items()}
    train(history, 9.0, 8.0)
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name])


def test_a_history_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has 16 steps, this layer's 4.*history=16"):
        AmaxHistory(4).load(AmaxHistory(16).state())
