import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fp8.train import TrainConfig, causal_lm_loss, packed_batches, train
from fusion.baselines import BASELINES
from fusion.contribution import LogitContribution
from fusion.extract import extract_logits
from fusion.models import (
    Architecture,
    ModelSpec,
    build_model,
    encode_documents,
    parameter_arrays,
    train_tokenizer,
)
from fusion.objective import fusion_loss
from fusion.prepare import prepare
from fusion.settings import FusionSettings
from fusion.unified import fuse
from fusion.windows import document_windows

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
    return parameter_arrays(net), result.train.losses


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
        {"routing": "document", "gate_nats": 0.0},
        {"alm_weight": 0.0, "other": False},
        {"fp8": True},
        {"apart": True, "seq_len": 64, "batch_size": 2},
        *({"loss": name, "distill_weight": 0.5} for name in BASELINES),
    ],
)
def test_every_method_learns_the_text_it_is_given(change: dict[str, Any]) -> None:
    settings = replace(SETTINGS, train=replace(TRAIN, steps=30), **{"batch_size": 8} | change)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a skipped step warns
        _, found = fused(both(), settings)
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5])


def test_span_kl_brings_the_pivot_to_the_expert_and_infifusion_does_not(tmp_path: Path) -> None:
    judge = prepare(pivot(), tokenizer(300), PROMPTS, {"a": contribution("a")}, SETTINGS, tmp_path)
    batch = judge.store.batch(torch.arange(200)[None])
    kl = {}
    for loss in ("span_kl", "infifusion"):
        net = pivot()
        train = replace(TRAIN, steps=40)
        settings = replace(SETTINGS, train=train, batch_size=8, distill_weight=1.0, loss=loss)
        fuse(net, tokenizer(300), PROMPTS, {"a": contribution("a")}, settings)
        with torch.no_grad():
            kl[loss] = fusion_loss(net, batch, SETTINGS)[1]["span_kl"]
    assert kl["span_kl"] < 0.5 * kl["infifusion"]


def test_an_fp8_run_leaves_a_plain_model() -> None:
    net = pivot()
    fuse(net, tokenizer(300), PROMPTS, both(), replace(SETTINGS, fp8=True))
    assert {type(m) for m in net.modules() if isinstance(m, torch.nn.Linear)} == {torch.nn.Linear}
    arrays, _ = fused(both())
    assert any(not np.array_equal(arrays[n], v) for n, v in parameter_arrays(net).items())


def test_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match="distill_weight"):
        replace(SETTINGS, distill_weight=1.5)
    with pytest.raises(ValueError, match="needs contributions"):
        fused({})


def test_documents_laid_apart_are_read_as_each_on_its_own(tmp_path: Path) -> None:
    net = pivot()
    store = prepare(net, tokenizer(300), PROMPTS, both(), SETTINGS, tmp_path).store
    rows = document_windows(store.offsets, batch_size=4, seq_len=64, seed=0)(0)
    batch = store.batch_apart(rows)
    loss, _ = fusion_loss(net, batch, SETTINGS)
    alone = [
        store.batch(torch.arange(first, end)[None])
        for first, end in pairwise(store.offsets.tolist())
        if (rows == first).any()
    ]
    losses = [fusion_loss(net, one, SETTINGS)[0] * one.tokens for one in alone]
    assert sum(one.tokens for one in alone) == batch.tokens < rows.numel()
    torch.testing.assert_close(loss, torch.stack(losses).sum() / batch.tokens)
