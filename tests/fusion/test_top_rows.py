import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion import top_rows as module
from fusion.contribution import ContributionError
from fusion.top_rows import top_rows


@pytest.fixture(params=["cpu", "device"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The code of other devices runs on CPU too, in place of CPU's own."""
    if request.param == "device":
        monkeypatch.setattr(module, "_on_cpu", module._on_device)
    return str(request.param)


def check(logits: torch.Tensor, k: int) -> None:
    labels = torch.arange(len(logits)) % logits.shape[1]
    found = top_rows(logits, labels, k)
    dense = logits.double().log_softmax(-1)
    top = dense.topk(k, dim=-1).values
    close = {"abs": 1e-4, "rel": 1e-5}
    assert found.logprobs == pytest.approx(top.clamp(-60).numpy(), **close)
    chosen = dense.gather(1, torch.from_numpy(found.ids).long())
    assert chosen.clamp(-60).numpy() == pytest.approx(found.logprobs, **close)
    own = dense.gather(1, labels[:, None])[:, 0]
    assert found.own == pytest.approx(own.clamp(-60).numpy(), **close)
    assert all(len(set(row)) == k for row in found.ids.tolist())
    rest = dense.scatter(1, torch.from_numpy(found.ids).long(), -torch.inf).logsumexp(-1)
    assert found.tail == pytest.approx(rest.clamp(-60, 0).numpy(), **close)


@settings(deadline=None)
@given(
    vocab=st.integers(1, 700),
    rows=st.integers(1, 5),
    seed=st.integers(0, 99),
    scale=st.sampled_from([0.0, 1.0, 20.0]),
    shift=st.sampled_from([0.0, 300.0, -300.0]),
    data=st.data(),
)
def test_what_is_kept_is_what_a_whole_log_softmax_says(
    vocab: int, rows: int, seed: int, scale: float, shift: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, vocab))
    generator = torch.Generator().manual_seed(seed)
    check(torch.randn(rows, vocab, generator=generator) * scale + shift, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_paths_and_lower_precision_say_the_same(path: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check((torch.randn(300, 5003) * 4).to(dtype), 16)


def test_a_small_tail_is_not_lost_to_cancellation(path: str) -> None:
    logits = torch.full((1, 1000), -30.0)
    logits[0, :4] = 5.0
    found = top_rows(logits, torch.zeros(1, dtype=torch.long), 4)
    wanted = np.log(996) - 35 - np.log(4)
    assert found.tail[0] == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("likeliest", [0, 5001, 5002])
def test_a_single_huge_logit_overflows_nothing_wherever_it_stands(
    path: str, likeliest: int
) -> None:
    """The last ids are in no whole block: 5003 is a prime."""
    logits = torch.randn(2, 5003, generator=torch.Generator().manual_seed(0))
    logits[0, likeliest] = 200.0
    check(logits, 16)


def test_masked_ids_are_at_the_floor(path: str) -> None:
    logits = torch.zeros(2, 8)
    logits[:, 3:] = -torch.inf
    found = top_rows(logits, torch.tensor([5, 0]), 4)
    assert found.own.tolist() == pytest.approx([-60, -np.log(3)])
    assert found.logprobs[0].tolist() == pytest.approx([-np.log(3)] * 3 + [-60])
    assert (found.tail == -60).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_numbers_are_refused(path: str, bad: float) -> None:
    logits = torch.zeros(2, 8)
    logits[1, 6] = bad
    with pytest.raises(ContributionError) as caught:
        top_rows(logits, torch.zeros(2, dtype=torch.long), 2)
    assert caught.value.code == "not_finite"
