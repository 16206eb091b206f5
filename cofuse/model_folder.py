"""A Hugging Face model directory as the fp8 commands read it: bf16, fp32 or block-FP8, all of it.

Loaded when a command needs it: torch and transformers take seconds.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging as hf_logging

from fp8.block_layout import ExportError, is_fp8_checkpoint, load_fp8_into
from fusion.models import LOADING, encode_text

TOKENIZER_FILES: Final = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja"),
)


class FolderError(ValueError):
    """A directory or text cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """The tokenizer of a directory, handed on to the letter: no library rewrites it."""

    folder: Path

    def save_pretrained(self, save_directory: Path, /) -> None:
        """Copy what there is of it."""
        for name in TOKENIZER_FILES:
            if (self.folder / name).exists():
                shutil.copyfile(self.folder / name, save_directory / name)


def load_folder(folder: Path) -> PreTrainedModel:
    """Load a causal language model in the dtype of its files, FP8 weights dequantised.

    Nothing is fetched and nothing made up. Raises: FolderError for what is no such directory, or
    is damaged, or lacks tensors.
    """
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise FolderError(f"{folder}: found no config.json, wanted a Hugging Face model directory")
    try:
        if is_fp8_checkpoint(folder):
            return _load_fp8(folder)
        with LOADING:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", local_files_only=True, output_loading_info=True
            )
    except (ExportError, OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise FolderError(f"{folder} cannot be loaded: {_first_lines(error)}") from error
    if missing := sorted(info["missing_keys"]):
        raise FolderError(
            f"{folder} lacks {len(missing)} tensors, the first is {missing[0]}; copy it again"
        )
    loaded: PreTrainedModel = model
    return loaded


def token_batch(folder: Path, text: Path, model: PreTrainedModel, tokens: int) -> Tensor:
    """Return the first ids of a text as [B, T], T at most 512 and at most the model's context.

    Raises: FolderError when the text, or the tokenizer for it, cannot be used.
    """
    try:
        words = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FolderError(f"{text} cannot be read as UTF-8 text: {error}") from error
    if not words.strip():
        raise FolderError(f"{text} is empty; give a file with text as the model will be trained on")
    if not (folder / "tokenizer.json").is_file():
        raise FolderError(
            f"{folder}: found no tokenizer.json to read {text} with; copy the tokenizer there, or "
            "leave --text out to look at the weights alone"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    # A token is at least one character; what lies beyond will not be used.
    ids = encode_text(tokenizer, words[: 40 * tokens])[:tokens]
    config: Any = model.config
    if max(ids, default=0) >= config.vocab_size or len(ids) < 2:
        raise FolderError(
            f"{text} gives {len(ids)} tokens, the largest {max(ids, default=0)}; wanted two or "
            f"more, all below the vocabulary of {config.vocab_size}: is the tokenizer the model's?"
        )
    length = min(512, int(config.max_position_embeddings), len(ids))
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length]).reshape(rows, length)


def _load_fp8(folder: Path) -> PreTrainedModel:
    """Load by our own reader: transformers' wants accelerate, and misreads ragged sizes."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    del config.quantization_config
    with LOADING, no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.bfloat16)
    model.tie_weights()
    load_fp8_into(model, folder)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
