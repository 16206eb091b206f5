"""The maths of a policy step, as laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from participant.stages.grpo import Clip, advantages, distance, token_losses

REWARDS = st.lists(st.one_of(st.none(), st.floats(-10, 10)), min_size=1, max_size=12)


@settings(deadline=None)
@given(REWARDS, st.floats(0.5, 4), st.floats(-5, 5))
def test_advantages_are_centred_scaled_and_blind_to_the_rewards_unit(
    rewards: list[float | None], scale: float, shift: float
) -> None:
    found = advantages(rewards)
    known = [r for r in rewards if r is not None]
    if len(known) < 2 or max(known) - min(known) < 1e-9:
        assert found is None
        return
    if max(known) - min(known) < 1e-3:
        return  # the other unit would round it away
    assert found is not None
    assert [a is None for a in found] == [r is None for r in rewards]
    mine = torch.tensor([a for a in found if a is not None], dtype=torch.float64)
    assert mine.mean().abs() < 1e-6
    assert mine.square().mean() == pytest.approx(1)
    other = advantages([None if r is None else scale * r + shift for r in rewards])
    assert other is not None
    theirs = torch.tensor([a for a in other if a is not None], dtype=torch.float64)
    assert torch.allclose(mine, theirs, atol=1e-6)


@settings(deadline=None)
@given(st.floats(-3, 0), st.floats(-2, 2).filter(lambda a: abs(a) > 1e-3))
def test_the_first_step_on_a_rollout_follows_the_advantage(logp: float, advantage: float) -> None:
    now = torch.tensor([logp], requires_grad=True)
    loss, told = token_losses(now, now.detach(), now.detach(), torch.tensor([advantage]), Clip())
    loss.sum().backward()
    assert now.grad is not None
    assert float(now.grad) == pytest.approx(-advantage)
    assert float(told["clipped"]) == 0


@pytest.mark.parametrize(
    ("gap", "advantage", "moves"),
    [
        (0.27, 1.0, False),  # exp(0.27) = 1.31 is above 1.28: it has grown enough
        (0.23, 1.0, True),  # 1.26 is above 1.2, but there is more room upwards
        (-0.25, -1.0, False),  # 0.78 is below 0.8: it has shrunk enough
        (-0.25, 1.0, True),  # what shrank by mistake may come back
        (0.27, -1.0, True),
    ],
)
def test_a_token_that_went_far_enough_moves_no_further(
    gap: float, advantage: float, moves: bool
) -> None:
    old = torch.tensor([-1.0])
    now = (old + gap).requires_grad_()
    loss, told = token_losses(now, old, old, torch.tensor([advantage]), Clip())
    loss.sum().backward()
    assert now.grad is not None
    assert bool(now.grad.abs() > 0) == moves
    assert bool(told["clipped"]) != moves


def test_a_token_counts_as_the_trainer_would_have_drawn_it_up_to_a_bound() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0])
    rollout = torch.tensor([-1.0, -0.5, -9.0])
    loss, told = token_losses(old, old, rollout, torch.ones(3), Clip())
    wanted = torch.tensor([1.0, 0.6065, 2.0])
    assert torch.allclose(told["weight"], wanted, atol=1e-4)
    assert torch.allclose(loss, -wanted, atol=1e-4)


@settings(deadline=None)
@given(st.floats(-5, 0), st.floats(-5, 0))
def test_the_distance_is_zero_only_at_the_reference(now: float, reference: float) -> None:
    found = float(distance(torch.tensor([now]), torch.tensor([reference])))
    assert found >= -1e-6
    assert (found < 1e-4) == (abs(now - reference) < 2e-2) or abs(now - reference) < 3e-2
