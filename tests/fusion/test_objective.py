"""The loss of a batch, of every method. This file is also the program that torchrun starts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fp8.batches import IGNORED, count_tokens, part_of
from fp8.convert import convert_to_float8_training
from fp8.distributed import join
from fp8.losses import causal_lm_loss
from fp8.recipe import BlockScaling
from fp8.train import TrainConfig, train
from fusion import losses
from fusion.methods import OBJECTIVES
from fusion.objective import DISTILL_WEIGHT, FusionBatch, faithful_weight, fusion_loss
from fusion.settings import FusionSettings

ROOT = Path(__file__).parents[2]
B, T, V, C, S, K = 4, 16, 48, 5, 2, 4
CHUNKED = {"chunk_from_vocab": 1, "chunk_tokens": 7}
TRAIN = TrainConfig(steps=6, lr=3e-3, warmup_steps=1, decay_steps=2, checkpoint_every=100)
SETTINGS = FusionSettings(train=TRAIN, batch_size=B, seq_len=T, distill_weight=0.6, alm_weight=0.5)
METHODS = sorted(OBJECTIVES)
Found = tuple[float, dict[str, float], list[Tensor]]


def pivot(dtype: torch.dtype = torch.float64, *, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=V,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def batch_of(seed: int = 0) -> FusionBatch:
    """Targets of every method at once, drawn by chance."""
    g = torch.Generator().manual_seed(seed)

    def probs(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g).sort(-1, descending=True).values / shape[-1]

    ids = torch.rand(B, T, V, generator=g).argsort(-1)
    length = torch.zeros(B, T, S, dtype=torch.int32)
    length[:, 5, 0], length[:, 6, 1], length[:, 14, 0] = 3, 2, 4
    length[:, 0, 1] = 2  # begins in the window before
    tokens = torch.zeros(B, T, S, dtype=torch.int32)
    tokens[:, ::3], tokens[:, 4, 1], tokens[:, 15, 0] = 1, 3, 2  # the last one leaves the window
    targets = {
        "ids": ids[..., :C].int(),
        "probs": probs(B, T, C),
        "weight": torch.rand(B, T, generator=g),
        "chunk_length": length,
        "chunk_logprob": -torch.rand(B, T, S, generator=g) * 5,
        "chunk_weight": torch.rand(B, T, S, generator=g),
        "rank_probs": probs(B, T, S, K).softmax(-1),
        "rank_mask": torch.rand(B, T, S, generator=g) < 0.8,
        "uld_probs": probs(B, T, S, K),
        "uld_each": torch.rand(B, T, S, generator=g) / V,
        "uld_size": torch.tensor([V - 5, V + 9]).repeat(B, T, 1).int(),
        "teacher_ids": ids[..., : S * K].reshape(B, T, S, K).int(),
        "teacher_probs": probs(B, T, S, K),
        "gold_tokens": tokens,
        "gold_ids": ids[..., : S * K].reshape(B, T, S, K).int(),
        "gold_probs": probs(B, T, S, K),
        "gold_rest": probs(B, T, S, K),
    }
    shared = {
        "projection_student": torch.arange(V).repeat(2),
        "projection_teacher": torch.cat([torch.arange(V), torch.arange(V) + 3]),
        "projection_share": torch.full((2 * V,), 0.5),
        "projection_size": torch.tensor(V + 3),
        "gold_matched": torch.rand(S, V, generator=g) < 0.7,
        "gold_share": torch.tensor([0.7, 0.3]),
    }
    stream = torch.randint(0, V, (B, T + 1), generator=g)
    return FusionBatch(stream[:, :-1], stream[:, 1:].clone(), targets, shared)


def of(model: nn.Module, batch: FusionBatch, **change: Any) -> Found:
    kwargs = {name: change.pop(name) for name in CHUNKED if name in change}
    model.zero_grad()
    loss, terms = fusion_loss(model, batch, replace(SETTINGS, **change), **kwargs)
    loss.backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return float(loss.detach()), dict(terms), [grad.clone() for grad in grads]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("loss", METHODS)
def test_chunks_of_logits_give_what_whole_ones_give(loss: str, tied: bool) -> None:
    net, batch = pivot(tied=tied), batch_of()
    whole, chunked = of(net, batch, loss=loss), of(net, batch, loss=loss, **CHUNKED)
    assert chunked[0] == pytest.approx(whole[0], rel=1e-9)
    assert chunked[1] == pytest.approx(whole[1], rel=1e-9)
    torch.testing.assert_close(chunked[2], whole[2], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", METHODS)
def test_parts_weighted_by_their_tokens_are_the_whole(loss: str) -> None:
    net, batch = pivot(), batch_of()
    batch.labels[0, 2:5] = IGNORED  # the parts then count different numbers of tokens
    whole = of(net, batch, loss=loss)
    assert batch.tokens == count_tokens(batch) == B * T - 3
    for parts in (2, 3):
        pieces = [part_of(batch, i, parts) for i in range(parts)]
        assert torch.equal(torch.cat([p.targets["probs"] for p in pieces]), batch.targets["probs"])
        share = [piece.tokens / batch.tokens for piece in pieces]
        assert sum(share) == pytest.approx(1)
        found = [of(net, piece, loss=loss) for piece in pieces]
        assert sum(w * f[0] for w, f in zip(share, found, strict=True)) == pytest.approx(whole[0])
        for index, grad in enumerate(whole[2]):
            summed = sum(w * f[2][index] for w, f in zip(share, found, strict=True))
            # Llama norms in fp32, whatever its own precision is: sums in another order differ.
            torch.testing.assert_close(summed, grad, rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_stated_mixture_of_plain_computations() -> None:
    net, batch = pivot(), batch_of()
    loss, terms, _ = of(net, batch)
    mixed = 0.4 * terms["ce"] + 0.6 * (terms["span_kl"] + 0.5 * terms["alm"])
    assert loss == pytest.approx(mixed, rel=1e-9)
    with torch.no_grad():
        logprobs = net(batch.inputs).logits.log_softmax(-1)
    own = logprobs.gather(-1, batch.labels[..., None])[..., 0]
    assert terms["ce"] == pytest.approx(-float(own.mean()), rel=1e-9)
    t = batch.targets
    log_s = logprobs.gather(-1, t["ids"].long())
    kl = losses.span_kl(log_s, torch.log1p(-log_s.exp().sum(-1)), t["probs"])
    assert terms["span_kl"] == pytest.approx(float((t["weight"] * kl).mean()), rel=1e-6)
    alm = 0.0
    for b, end, s in t["chunk_length"].nonzero().tolist():
        first = end - int(t["chunk_length"][b, end, s]) + 1
        if first >= 0:
            chunk = own[b, first : end + 1].sum()
            cost = losses.alm(chunk, t["chunk_logprob"][b, end, s].double())
            alm += float(t["chunk_weight"][b, end, s] * cost) / (B * T)
    assert terms["alm"] == pytest.approx(alm, rel=1e-9)


def test_without_chunks_of_text_there_is_no_alm() -> None:
    batch = batch_of()
    kept = {name: batch.targets[name] for name in ("ids", "probs", "weight")}
    bare = replace(batch, targets=kept)
    assert of(pivot(), bare)[1]["alm"] == 0
    assert of(pivot(), bare, **CHUNKED)[1]["alm"] == 0
    assert "alm" not in of(pivot(), bare, alm_weight=0.0)[1]


@pytest.mark.parametrize("loss", [m for m in METHODS if m != "none"])
def test_positions_that_nobody_speaks_of_get_no_gradient(loss: str) -> None:
    batch = batch_of()
    silent = {
        "weight": 0.0,
        "chunk_weight": 0.0,
        "rank_mask": False,
        "uld_size": 0,
        "teacher_ids": -1,
        "gold_tokens": 0,
        "probs": 0.0,
    }
    for name, nothing in silent.items():
        if loss != "span_kl" or name != "probs":  # of span_kl the weight alone decides
            batch.targets[name][:] = nothing
    _, _, grads = of(pivot(), batch, loss=loss, distill_weight=1.0)
    assert all(not grad.any() for grad in grads)


@pytest.mark.parametrize("loss", METHODS)
def test_ignored_labels_get_no_gradient_from_any_term(loss: str) -> None:
    batch = batch_of()
    batch.labels[:] = IGNORED
    _, terms, grads = of(pivot(), batch, loss=loss)
    assert all(not grad.any() for grad in grads)
    assert not any(terms.values())


def test_a_method_does_not_hang_on_targets_of_others() -> None:
    batch = batch_of()
    for loss, objective in OBJECTIVES.items():
        kept = {n: v for n, v in batch.targets.items() if n in objective.needs}
        shared = {n: v for n, v in batch.shared.items() if n in objective.shares}
        lean = FusionBatch(batch.inputs, batch.labels, kept, shared)
        assert torch.isfinite(torch.tensor(of(pivot(), lean, loss=loss)[0]))
        for name in objective.needs:
            less = {n: v for n, v in kept.items() if n != name}
            with pytest.raises(ValueError, match=f"loss '{loss}' reads {name}"):
                of(pivot(), FusionBatch(batch.inputs, batch.labels, less, shared), loss=loss)


def test_the_control_is_plain_training() -> None:
    net, batch = pivot(torch.float32), batch_of()
    ids = torch.cat([batch.inputs, batch.labels[:, -1:]], -1)
    ids[:, 1:] = batch.labels
    plain = causal_lm_loss(net, {"input_ids": ids})
    plain.backward()
    wanted = [p.grad.clone() for p in net.parameters()]  # type: ignore[union-attr]
    for change in ({}, CHUNKED):
        loss, _, grads = of(net, batch, loss="none", **change)
        assert loss == pytest.approx(float(plain.detach()), rel=1e-6)
        torch.testing.assert_close(grads, wanted, rtol=1e-4, atol=1e-7)


def test_an_fp8_pivot_learns_and_its_head_may_be_fp8() -> None:
    net = pivot(torch.float32)
    recipe = BlockScaling(gemm="float32")
    convert_to_float8_training(net, recipe, head=recipe)
    exact = pivot(torch.float32)
    for change in ({}, {"chunk_from_vocab": 1}):
        found, wanted = of(net, batch_of(), **change), of(exact, batch_of(), **change)
        assert found[0] == pytest.approx(wanted[0], rel=0.02)
    curve = train(net, lambda _: batch_of(), loss_fn, replace(TRAIN, steps=20)).losses
    assert curve[-1] < 0.9 * curve[0]


@pytest.mark.slow
def test_a_compiled_model_gives_the_same() -> None:
    net, batch = pivot(), batch_of()
    wanted = of(net, batch)
    compiled = torch.compile(net, backend="eager")
    for change in ({}, CHUNKED):
        found = of(compiled, batch, **change)
        assert found[0] == pytest.approx(wanted[0], rel=1e-9)
        torch.testing.assert_close(found[2], wanted[2])


def test_published_weights_are_known_for_every_method() -> None:
    assert DISTILL_WEIGHT.keys() == OBJECTIVES.keys()
    assert faithful_weight(replace(SETTINGS, loss="minced")) == 0.1
    assert faithful_weight(SETTINGS) == SETTINGS.distill_weight


# -- two processes


def loss_fn(model: nn.Module, batch: FusionBatch) -> Any:
    return fusion_loss(model, batch, SETTINGS)


def chunked_fn(model: nn.Module, batch: FusionBatch) -> Any:
    return fusion_loss(model, batch, SETTINGS, **CHUNKED)


def minced_fn(model: nn.Module, batch: FusionBatch) -> Any:
    return fusion_loss(model, batch, replace(SETTINGS, loss="minced"))


RUNS = {"span": loss_fn, "chunked": chunked_fn, "minced": minced_fn}


def curves() -> dict[str, list[float]]:
    return {
        f"{name} {tied}": train(pivot(tied=tied), lambda _: batch_of(), fn, TRAIN).losses
        for name, fn in RUNS.items()
        for tied in (False, True)
    }


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(tmp_path / "found.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    found, alone = json.loads((tmp_path / "found.json").read_text()), curves()
    assert found.keys() == alone.keys()
    for name, wanted in alone.items():
        assert wanted[-1] < wanted[0]
        assert found[name] == pytest.approx(wanted, rel=1e-6)


if __name__ == "__main__":
    torch.set_num_threads(1)
    first = join().first
    result = curves()
    if first:
        Path(sys.argv[1]).write_text(json.dumps(result))
