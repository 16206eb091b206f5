"""What both FP8 benchmarks measure on: models of Qwen2.5's shapes, and continual pre-training.

The weights are random: speed and memory do not depend on them. Continual pre-training reads the
sources of the standard library, so nothing is downloaded; the numbers differ a little from one
version of Python to the next.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final

# Run as a script, the folder of benchmarks comes first and fp8.py passes for package `fp8`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from fp8.linear import Float8Linear
from fp8.train import TrainConfig, causal_lm_loss, packed_batches, train

MODULES: Final = (
    "argparse ast asyncio.base_events calendar codecs collections configparser contextlib copy csv "
    "dataclasses datetime decimal difflib dis doctest email.message enum fractions ftplib "
    "functools gettext glob gzip heapq imaplib inspect ipaddress json.decoder locale "
    "mailbox mimetypes optparse os pathlib pdb pickle pickletools platform plistlib "
    "poplib pprint pydoc random shutil smtplib socket ssl statistics string subprocess tarfile "
    "tempfile textwrap threading trace traceback turtle typing unittest.mock urllib.request uuid "
    "warnings wave weakref xml.dom.minidom zipfile"
)
"""Whose sources are the text; those that a version of Python lacks are left out."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a Qwen2 model."""

    hidden: int
    inter: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int
    tied: bool

    def config(self, *, layers: int | None = None, positions: int = 32_768) -> Qwen2Config:
        """Return transformers' config, with fewer layers if asked for."""
        return Qwen2Config(
            hidden_size=self.hidden,
            intermediate_size=self.inter,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_hidden_layers=layers or self.layers,
            vocab_size=self.vocab,
            tie_word_embeddings=self.tied,
            max_position_embeddings=positions,
            attn_implementation="sdpa",
        )

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return (out_features, in_features) of a decoder layer's seven linear layers."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "q": (self.hidden, self.hidden),
            "k": (kv, self.hidden),
            "v": (kv, self.hidden),
            "o": (self.hidden, self.hidden),
            "gate": (self.inter, self.hidden),
            "up": (self.inter, self.hidden),
            "down": (self.hidden, self.inter),
        }


SHAPES: Final[Mapping[str, Shape]] = MappingProxyType(
    {
        "1.5B": Shape(
            hidden=1536, inter=8960, heads=12, kv_heads=2, layers=28, vocab=151_936, tied=True
        ),
        "7B": Shape(
            hidden=3584, inter=18_944, heads=28, kv_heads=4, layers=28, vocab=152_064, tied=False
        ),
        "toy": Shape(hidden=128, inter=256, heads=4, kv_heads=2, layers=2, vocab=512, tied=True),
    }
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """Continual pre-training of one byte-level model: sizes, steps and the seed of everything."""

    hidden: int = 256
    inter: int = 704
    layers: int = 2
    batch_size: int = 8
    seq_len: int = 128
    base_steps: int = 200
    steps: int = 50
    eval_batches: int = 8
    lr: float = 5e-4
    """Of the continuation; the checkpoint's is 3e-3."""
    seed: int = 0

    def train_at(self) -> Callable[[int], Tensor]:
        """Return the training batches [B, T1] by step."""
        return packed_batches(
            text(train=True), batch_size=self.batch_size, seq_len=self.seq_len, seed=self.seed
        )

    def evaluation(self) -> list[Tensor]:
        """Return the held-out batches; the same for every seed."""
        held_out = packed_batches(text(train=False), batch_size=16, seq_len=self.seq_len, seed=0)
        return [held_out(step) for step in range(self.eval_batches)]

    def base(self, device: torch.device | str = "cpu") -> nn.Module:
        """Return the checkpoint that every arm starts from, trained in fp32."""
        torch.manual_seed(self.seed)
        config = Qwen2Config(
            hidden_size=self.hidden,
            intermediate_size=self.inter,
            num_hidden_layers=self.layers,
            num_attention_heads=self.hidden // 64,
            num_key_value_heads=max(1, self.hidden // 128),
            vocab_size=256,
            tie_word_embeddings=True,
            max_position_embeddings=self.seq_len,
        )
        model: nn.Module = Qwen2ForCausalLM(config).to(device)
        began = self._schedule(self.base_steps, 3e-3)
        train(model, self.train_at(), causal_lm_loss, replace(began, decay_steps=0))
        return model

    def continue_from(
        self,
        base: nn.Module,
        prepare: Callable[[nn.Module], object],
        loss_fn: Callable[[nn.Module, Tensor], Tensor] = causal_lm_loss,
        *,
        first_batch: int | None = None,
    ) -> nn.Module:
        """Train a copy of base on the next batches, after `prepare` had its way with it."""
        model, batch_at = copy.deepcopy(base), self.train_at()
        prepare(model)
        start = self.base_steps if first_batch is None else first_batch
        schedule = self._schedule(self.steps, self.lr)
        train(model, lambda step: batch_at(start + step), loss_fn, schedule)
        return model

    def _schedule(self, steps: int, lr: float) -> TrainConfig:
        return TrainConfig(
            steps=steps,
            lr=lr,
            warmup_steps=max(1, steps // 10),
            decay_steps=steps // 2,
            seed=self.seed,
        )


def held_out_loss(
    model: nn.Module,
    batches: list[Tensor],
    loss_fn: Callable[[nn.Module, Tensor], Tensor] = causal_lm_loss,
) -> float:
    """Mean loss in nats."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        total = sum(float(loss_fn(model, batch)) for batch in batches)
    model.train(was_training)
    return total / len(batches)


@cache
def text(*, train: bool) -> NDArray[np.uint8]:
    """Return the bytes to train on, or those of the modules that are held out (every tenth)."""
    found = []
    for place, name in enumerate(MODULES.split()):
        spec = importlib.util.find_spec(name) if (place % 10 == 9) != train else None
        if spec is not None and str(spec.origin).endswith(".py"):
            found.append(Path(str(spec.origin)).read_bytes())
    return np.frombuffer(b"\n".join(found), dtype=np.uint8)


def linear_gradients(model: nn.Module, like: nn.Module) -> dict[str, Tensor]:
    """Gradients of the weights of `model` that are low-precision layers in `like`."""
    names = [f"{name}.weight" for name, m in like.named_modules() if isinstance(m, Float8Linear)]
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: g for name in names if (g := gradients[name]) is not None}


def gradient_error(found: Mapping[str, Tensor], true: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative errors, in per cent, and the smallest cosine, over the weights of `found`."""
    errors = [100 * float((found[n] - true[n]).norm() / true[n].norm()) for n in found]
    cosines = [
        float(nn.functional.cosine_similarity(found[n].flatten(), true[n].flatten(), dim=0))
        for n in found
    ]
    return {
        "mean_pct": sum(errors) / len(errors),
        "max_pct": max(errors),
        "min_cosine": min(cosines),
    }
