"""Tokenizers in the files their makers ship, as Hugging Face fast tokenizers with the same ids.

Rank tables (tiktoken, Mistral's Tekken) and SentencePiece models say which pairs merge only by
the rank of what comes out, so every split of a token into two others becomes a merge, in the order
of the token's rank. None of the makers' own packages is needed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# The file format as transformers holds it: sentencepiece's own wants a newer protobuf than ours.
from transformers.utils import sentencepiece_model_pb2_new

from fusion.byte_tables import TokenizerError, byte_of_symbol

# Possessive quantifiers of the originals ({1,3}+, ?+) are written as plain ones: where one
# alternative stops, the next can never take over what it would have to give back.
CL100K: Final = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How cl100k_base (GPT-4, Phi-4) and Llama 3 cut a text before they merge."""
QWEN: Final = CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
"""How Qwen cuts a text: as cl100k, but every digit is alone."""
_O200K_HEAD: Final = r"[^\r\n\p{L}\p{N}]?"
_O200K_TAIL: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K: Final = (
    rf"{_O200K_HEAD}{_UPPER}*{_LOWER}+{_O200K_TAIL}|{_O200K_HEAD}{_UPPER}+{_LOWER}*{_O200K_TAIL}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How o200k_base (GPT-4o) cuts a text."""

SPACE: Final = "\u2581"
"""SentencePiece's mark for a space."""
_UNIGRAM: Final = 1
_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4


def from_ranks(
    ranks: Mapping[bytes, int],
    pattern: str,
    special_tokens: Mapping[str, int],
    *,
    eos: str,
) -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer that cuts every text as the rank table does.

    Args: ranks: id of every piece; the pair whose piece has the lowest is merged first. pattern:
        what is cut apart before merging, in Oniguruma's syntax ("{1,3}+" repeats there: leave
        "+" out). special_tokens: id of every special; eos is one of them.
    Raises: TokenizerError when a byte is no piece, or a special has the name of a piece.
    """
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise TokenizerError(
            f"bytes {missing[:4]} are no piece of the rank table, so some text could not be "
            "written; take the whole table"
        )
    symbols = {byte: symbol for symbol, byte in byte_of_symbol().items()}
    vocab = {"".join(symbols[byte] for byte in piece): index for piece, index in ranks.items()}
    if both := sorted(vocab.keys() & special_tokens.keys()):
        raise TokenizerError(
            f"{both[:3]} are special tokens and pieces of text: rename the special"
        )
    model = models.BPE(vocab={**vocab, **special_tokens}, merges=_merges(vocab), ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special_tokens))
    return _fast(tokenizer, eos)


def load_tiktoken(
    path: Path,
    pattern: str,
    special_tokens: Mapping[str, int] | None = None,
    *,
    eos: str = "<|endoftext|>",
) -> PreTrainedTokenizerFast:
    """Read a tiktoken file: a base64 piece and its rank on each line.

    Args: special_tokens: None: eos alone, after the highest rank. The file names none.
    """
    lines = (line.split() for line in path.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    specials = {eos: max(ranks.values()) + 1} if special_tokens is None else special_tokens
    return from_ranks(ranks, pattern, specials, eos=eos)


def load_tekken(path: Path, *, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Read Mistral's tekken.json: the specials have the first ids, the pieces follow by rank."""
    spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    config = spec["config"]
    count: int = config["default_num_special_tokens"]
    special = {f"<SPECIAL_{index}>": index for index in range(count)}
    named = spec.get("special_tokens") or [
        {"token_str": name, "rank": rank} for rank, name in enumerate(("<unk>", "<s>", "</s>"))
    ]
    for token in named:
        del special[f"<SPECIAL_{token['rank']}>"]
        special[token["token_str"]] = token["rank"]
    # The file holds more pieces than the models were trained with.
    kept = spec["vocab"][: config["default_vocab_size"] - count]
    ranks = {base64.b64decode(piece["token_bytes"]): piece["rank"] + count for piece in kept}
    return from_ranks(ranks, config["pattern"], special, eos=eos)


def load_sentencepiece(path: Path, *, eos: str = "</s>") -> PreTrainedTokenizerFast:
    """Read a SentencePiece .model file, BPE or Unigram.

    Raises: TokenizerError when the model normalizes text by a table of its own, as T5's does.
    """
    proto = sentencepiece_model_pb2_new.ModelProto()
    proto.ParseFromString(path.read_bytes())
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if rules.precompiled_charsmap or rules.remove_extra_whitespaces:
        raise TokenizerError(
            f"{path.name} rewrites text before it reads it ({rules.name}, "
            f"remove_extra_whitespaces={rules.remove_extra_whitespaces}), so bytes are lost; use a "
            "model that keeps them (normalization identity, as of Llama 2, Mistral, Gemma)"
        )
    byte_fallback = bool(trainer.byte_fallback)
    model: models.Model
    if trainer.model_type == _UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(scored, unk_id=trainer.unk_id, byte_fallback=byte_fallback)
    else:
        vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
        ranks = {p.piece: -p.score for p in proto.pieces if p.type in (_NORMAL, _USER_DEFINED)}
        model = models.BPE(
            vocab=vocab,
            merges=_merges(ranks),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=byte_fallback,
        )
    tokenizer = Tokenizer(model)
    before = [normalizers.Prepend(SPACE)] if rules.add_dummy_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
    after = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *after]
    )
    # User-defined pieces are searched in the text as the model sees it: with its spaces marked.
    tokenizer.add_tokens(
        [AddedToken(p.piece, normalized=True) for p in proto.pieces if p.type == _USER_DEFINED]
    )
    tokenizer.add_special_tokens(
        [p.piece for p in proto.pieces if p.type == _CONTROL] + [trainer.unk_piece]
    )
    return _fast(tokenizer, eos)


def _merges(ranks: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return every split of every ranked token into two tokens, lowest rank first."""
    known = ranks.keys()
    return [
        (token[:cut], token[cut:])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _fast(tokenizer: Tokenizer, eos: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False
    )
