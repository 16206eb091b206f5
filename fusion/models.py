"""Experts and pivots: small language models with their own tokenizers, as ordinary HF folders.

A document is encoded alone and ends in eos; eos is also what a model reads before a document's
first token. There is no BOS. Shapes: N = tokens of a stream.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as hf_logging

from fusion.byte_tables import TokenizerError as TokenizerError
from fusion.byte_tables import encode_text as encode_text
from fusion.byte_tables import eos_id as eos_id

EOS: Final = "<|endoftext|>"
EOS_ID: Final = 0
Architecture = Literal["llama", "qwen2", "gpt_neox"]
LOADING: Final = threading.Lock()
"""Held while a model is built or loaded: transformers patches torch's initialisers for the whole
process meanwhile, so that another thread's model would keep whatever lay in its memory."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shape of one causal language model."""

    architecture: Architecture
    hidden_size: int
    layers: int
    heads: int
    vocab_size: int
    context: int = 256
    """Tokens the model can see at once."""
    intermediate_size: int | None = None
    """Width of the MLP; None: 8/3 of hidden_size (gated), 4 of it (gpt_neox), up to next 64."""

    def mlp_size(self) -> int:
        """Width of the MLP in features."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        wanted = self.hidden_size * (4 if self.architecture == "gpt_neox" else 8 / 3)
        return -(-int(wanted) // 64) * 64


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lossless byte-level BPE tokenizer with eos as id 0, no BOS and no prefix space.

    Args: vocab_size: at least 257 (all bytes and eos); fewer come out when the text has too
        few different pairs.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size is {vocab_size}, but 256 bytes and eos need 257: ask for at least 257"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=EOS,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, docs: Sequence[str]) -> NDArray[np.int64]:
    """One stream ids_N: every document followed by eos, and no BOS whatever the tokenizer adds.

    Raises: TokenizerError when a document's ids would not spell it.
    """
    eos = eos_id(tokenizer)
    stream: list[int] = []
    for doc in docs:
        stream.extend(encode_text(tokenizer, doc))
        stream.append(eos)
    return np.asarray(stream, dtype=np.int64)


def build_model(spec: ModelSpec, seed: int) -> PreTrainedModel:
    """Build a freshly initialised fp32 model; the same seed gives the same weights."""
    common: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "intermediate_size": spec.mlp_size(),
        "max_position_embeddings": spec.context,
        "bos_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        # A padding id has a zero embedding that never learns; ours would be eos, the start of all.
        "pad_token_id": None,
        # The usual 0.02 is meant for widths near 768; at 128 it delays learning several times over.
        "initializer_range": 0.02 * math.sqrt(768 / spec.hidden_size),
        "use_cache": False,
        "tie_word_embeddings": True,
    }
    with LOADING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel
        if spec.architecture == "llama":
            model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=spec.heads, **common))
        elif spec.architecture == "qwen2":
            model = Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=spec.heads, **common))
        else:
            model = GPTNeoXForCausalLM(GPTNeoXConfig(**common))
    return model.float()


def context_length(model: PreTrainedModel) -> int:
    """Tokens the model can see at once."""
    return int(model.config.max_position_embeddings)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write an ordinary folder: config, fp32 safetensors, tokenizer."""
    hf_logging.disable_progress_bar()
    model.save_pretrained(directory, safe_serialization=True)
    tokenizer.save_pretrained(directory)


def load_model(directory: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Read a folder of save_model (or any local HF one) in fp32. Nothing is fetched.

    The tokenizer is tokenizer.json to the letter. AutoTokenizer would rebuild it from vocabulary
    and merges by the model's type, with (say) Qwen's own splitting rules, and so encode otherwise.
    """
    hf_logging.disable_progress_bar()
    with LOADING:
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, local_files_only=True
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    return model, tokenizer


def parameter_arrays(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    """Copy the parameters by name, in fp32, tied ones once: what weights rounds merge."""
    return {
        name: parameter.detach().to("cpu", torch.float32).numpy().copy()
        for name, parameter in model.named_parameters()
    }


def load_parameter_arrays(model: PreTrainedModel, arrays: dict[str, NDArray[np.float32]]) -> None:
    """Put arrays of parameter_arrays into the model. Raises ValueError on any other name."""
    parameters = dict(model.named_parameters())
    if arrays.keys() != parameters.keys():
        odd = sorted(arrays.keys() ^ parameters.keys())[:3]
        raise ValueError(f"parameters {odd} are on one side only; take both from the same pivot")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(arrays[name]))
