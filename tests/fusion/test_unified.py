import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fp8.train import TrainConfig, causal_lm_loss, packed_batches, train
from fusion import losses
from fusion.codec import LogitContribution
from fusion.extract import extract_logits
from fusion.models import (
    Architecture,
    ModelSpec,
    build_model,
    encode_documents,
    parameter_arrays,
    train_tokenizer,
)
from fusion.settings import FusionSettings
from fusion.unified import Windows, fuse, fusion_loss, prepare

PROMPTS = [f"Code I{n} is infarction of part {n}, left side." for n in range(20)]
TRAIN = TrainConfig(steps=6, lr=3e-3, warmup_steps=1, decay_steps=2, checkpoint_every=2)
SETTINGS = FusionSettings(train=TRAIN, batch_size=2, seq_len=16)


def model(architecture: Architecture, vocab_size: int, seed: int) -> PreTrainedModel:
    spec = ModelSpec(
        architecture=architecture, hidden_size=32, layers=1, heads=2, vocab_size=vocab_size
    )
    return build_model(spec, seed)


@cache
def tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    return train_tokenizer(PROMPTS[: vocab_size - 280], vocab_size)


def pivot() -> PreTrainedModel:
    return model("llama", len(tokenizer(300)), 0)


@cache
def contribution(name: str) -> LogitContribution:
    architecture, vocab_size = {"a": ("qwen2", 290), "b": ("gpt_neox", 320)}[name]
    expert = model(architecture, len(tokenizer(vocab_size)), 5)  # type: ignore[arg-type]
    stream = encode_documents(tokenizer(vocab_size), PROMPTS)
    batches = packed_batches(stream, batch_size=4, seq_len=16, seed=0)
    train(expert, batches, causal_lm_loss, replace(TRAIN, steps=20))
    return extract_logits(
        expert,
        tokenizer(vocab_size),
        PROMPTS,
        top_k=16,
        prompt_set_sha256="a" * 64,
        model_sha256=name * 64,
    )


def fused(
    contributions: Mapping[str, LogitContribution], settings: FusionSettings = SETTINGS, **how: Any
) -> tuple[dict[str, np.ndarray], list[float]]:
    net = pivot()
    result = fuse(net, tokenizer(300), PROMPTS, contributions, settings, **how)
    return parameter_arrays(net), result.losses


def both() -> dict[str, LogitContribution]:
    return {name: contribution(name) for name in ("a", "b")}


def test_the_control_is_plain_training_on_the_same_text_and_steps() -> None:
    net = pivot()
    stream = np.concatenate([[0], encode_documents(tokenizer(300), PROMPTS)])
    batches = packed_batches(stream, batch_size=2, seq_len=16, seed=TRAIN.seed)
    wanted = train(net, batches, causal_lm_loss, TRAIN).losses
    arrays, found = fused({}, replace(SETTINGS, loss="none"))
    assert found == pytest.approx(wanted, rel=1e-5)
    for name, value in parameter_arrays(net).items():
        assert arrays[name] == pytest.approx(value, abs=1e-4)


def test_the_order_in_which_contributions_arrive_changes_no_bit() -> None:
    one, _ = fused({name: both()[name] for name in ("a", "b")})
    two, _ = fused({name: both()[name] for name in ("b", "a")})
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_a_run_that_was_stopped_ends_like_one_that_was_not(tmp_path: Path) -> None:
    asked: list[int] = []

    def stop() -> bool:
        asked.append(0)
        return len(asked) > 3

    _, first = fused(both(), checkpoint_dir=tmp_path, should_stop=stop)
    assert len(first) == 3
    resumed, resumed_losses = fused(both(), checkpoint_dir=tmp_path)
    whole, whole_losses = fused(both())
    assert resumed_losses == whole_losses
    assert all(np.array_equal(resumed[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"routing": "uniform"},
        {"alm_weight": 0.0},
        {"loss": "infifusion", "distill_weight": 0.5},
    ],
)
def test_every_method_learns_the_text_it_is_given(change: dict[str, Any]) -> None:
    settings = replace(SETTINGS, train=replace(TRAIN, steps=30), batch_size=8, **change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a skipped step warns
        _, found = fused(both(), settings)
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5])


def test_span_kl_brings_the_pivot_to_the_expert_and_infifusion_does_not() -> None:
    kl = {}
    for loss in ("span_kl", "infifusion"):
        net = pivot()
        settings = replace(
            SETTINGS,
            train=replace(TRAIN, steps=40),
            batch_size=8,
            distill_weight=1.0,
            loss=loss,
        )
        fuse(net, tokenizer(300), PROMPTS, {"a": contribution("a")}, settings)
        judge = prepare(pivot(), tokenizer(300), PROMPTS, {"a": contribution("a")}, SETTINGS).spans
        assert judge is not None
        stream = torch.from_numpy(np.append(0, encode_documents(tokenizer(300), PROMPTS)))
        with torch.no_grad():
            logprobs = net(stream[None, :200]).logits[0].log_softmax(-1)
        kl[loss] = float(losses.span_kl(logprobs, judge.ids[:200].long(), judge.probs[:200]).mean())
    assert kl["span_kl"] < 0.5 * kl["infifusion"]


def test_the_loss_is_the_stated_mixture_and_its_parts_are_reported() -> None:
    net, data = pivot(), prepare(pivot(), tokenizer(300), PROMPTS, both(), SETTINGS)
    rows = torch.arange(32).reshape(2, 16) + 7
    loss, parts = fusion_loss(net, Windows(rows), data, SETTINGS)
    distill = parts["span_kl"] + SETTINGS.alm_weight * parts["alm"]
    assert loss.item() == pytest.approx(
        (1 - SETTINGS.distill_weight) * parts["ce"] + SETTINGS.distill_weight * distill, rel=1e-5
    )
    with torch.no_grad():
        logits = net(data.stream[rows]).logits
    ce = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.stream[rows + 1].flatten())
    assert parts["ce"] == pytest.approx(float(ce), rel=1e-5)
    assert Windows(rows).tokens == 32


def test_alm_compares_each_chunk_that_lies_whole_in_a_window_once() -> None:
    net, data = pivot(), prepare(pivot(), tokenizer(300), PROMPTS, both(), SETTINGS)
    assert data.chunks is not None
    row, expert = (int(x[0]) for x in data.chunks.length.nonzero(as_tuple=True))
    length = int(data.chunks.length[row, expert])
    inside = torch.arange(row - length + 1, row + 1)[None]
    only = replace(
        data.chunks,
        weight=torch.zeros_like(data.chunks.weight).index_put(
            (torch.tensor(row), torch.tensor(expert)), torch.tensor(1.0)
        ),
    )
    with torch.no_grad():
        logits = net(data.stream[inside]).logits[0].log_softmax(-1)
    own = logits.gather(-1, data.stream[inside[0] + 1][:, None]).sum()
    wanted = losses.alm(own, data.chunks.logprob[row, expert]) / length
    with_chunk = replace(data, chunks=only)
    _, parts = fusion_loss(net, Windows(inside), with_chunk, SETTINGS)
    assert parts["alm"] == pytest.approx(float(wanted), rel=1e-4)
    _, cut = fusion_loss(net, Windows(inside[:, 1:]), with_chunk, SETTINGS)
    assert cut["alm"] == 0


def test_rows_that_no_candidate_covers_get_no_gradient_from_the_experts() -> None:
    settings = replace(SETTINGS, distill_weight=1.0, routing="uniform", alm_weight=0.0)
    data = prepare(pivot(), tokenizer(300), PROMPTS, {"b": contribution("b")}, settings)
    assert data.spans is not None
    bare = (data.spans.weight == 0).nonzero()[:, 0]
    assert len(bare) > 0
    net = pivot()
    loss, _ = fusion_loss(net, Windows(bare[:1, None]), data, settings)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in net.parameters())


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match="distill_weight"):
        replace(SETTINGS, distill_weight=1.5)
    with pytest.raises(ValueError, match="needs contributions"):
        fused({})
