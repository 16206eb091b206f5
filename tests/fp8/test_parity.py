"""Continual pre-training in FP8 ends where fp32 ends, from one checkpoint on the same batches.

From scratch the two drift apart like two seeds (1.5 %), which would hide any fault.
"""

import argparse
import copy
import inspect
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from fp8.convert import convert_to_float8_training
from fp8.recipe import BlockScaling
from fp8.train import TrainConfig, causal_lm_loss, packed_batches, train

RECIPES = {
    "p2": BlockScaling(),
    "p2-bf16": BlockScaling(gemm="bfloat16"),
    "fp32": BlockScaling(scale_format="fp32"),
}
TEXT = np.frombuffer(inspect.getsource(argparse).encode(), dtype=np.uint8)
TRAIN_AT = packed_batches(TEXT[:70_000], batch_size=8, seq_len=96, seed=0)
EVAL_AT = packed_batches(TEXT[70_000:85_000], batch_size=16, seq_len=96, seed=0)


def held_out_loss(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        return sum(float(causal_lm_loss(model, EVAL_AT(step))) for step in range(9)) / 9


def test_fp8_loses_at_most_half_a_percent(tiny_model: Callable[..., nn.Module]) -> None:
    base = tiny_model(hidden=96, tied=True)
    pretrain = TrainConfig(steps=100, lr=3e-3, warmup_steps=10, decay_steps=0)
    train(base, TRAIN_AT, causal_lm_loss, pretrain)
    began = held_out_loss(base)
    go_on = TrainConfig(steps=40, lr=1e-3, warmup_steps=5, decay_steps=20)

    def continued(recipe: BlockScaling | None) -> float:
        model = copy.deepcopy(base)
        if recipe is not None:
            convert_to_float8_training(model, recipe)
        train(model, lambda step: TRAIN_AT(100 + step), causal_lm_loss, go_on)
        return held_out_loss(model)

    fp32 = continued(None)
    assert fp32 < 0.95 * began  # there was something to learn
    gaps = {name: continued(recipe) / fp32 - 1 for name, recipe in RECIPES.items()}
    assert all(math.isfinite(gap) and abs(gap) <= 0.005 for gap in gaps.values()), gaps
    assert all(gap != 0 for gap in gaps.values())
