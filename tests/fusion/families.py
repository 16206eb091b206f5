"""Small tokenizers of every family that byte tables read, trained on the same few sentences."""

import json
from collections.abc import Callable, Mapping

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from benchmarks.tokenizer_files import CL100K, SPACE, from_ranks
from fusion.byte_tables import byte_table
from fusion.models import train_tokenizer

TEXTS = [
    "Code I63.9 is cerebral infarction, caf\u00e9 \u2014 unspecified.",
    "Neoplasm of the breast;  the left breast.\n\tIndented </s> line <s>.",
] * 8
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
EOS = "</s>"


def fast(tokenizer: Tokenizer, eos: str = EOS) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=eos, clean_up_tokenization_spaces=False
    )


def byte_level(*, prefix_space: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXTS, 330)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=prefix_space
    )
    return tokenizer


def with_added_tokens() -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(TEXTS, 330)
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("    ", "<th\u00efnk>")])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return tokenizer


def rank_table() -> PreTrainedTokenizerFast:
    pieces = byte_table(train_tokenizer(TEXTS, 330), 330).pieces
    ranks = {piece: rank for rank, piece in enumerate(p for p in pieces if p)}
    special = {EOS: len(ranks), "<|endoftext|>": len(ranks) + 5}
    return from_ranks(ranks, CL100K, special, eos=EOS)


def _sentencepiece_bpe(**rules: object) -> Tokenizer:
    """Llama 2's kind: pieces with a mark for the space, and bytes for what is no piece."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    found = json.loads(trained.to_str())["model"]
    # The merges can build </s>, as those that are derived from a SentencePiece model can.
    names = ["<unk>", "<s>", EOS, *BYTES, *found["vocab"], "</", "s>"]
    vocab = {name: index for index, name in enumerate(dict.fromkeys(names))}
    merges = [tuple(pair) for pair in found["merges"]]
    merges += [("<", "/"), ("s", ">"), ("</", "s>")]
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", EOS])
    for name, rule in rules.items():
        setattr(tokenizer, name, rule)
    return tokenizer


def _decoder(*, strip: bool) -> decoders.Sequence:
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if strip else [])])


def llama() -> PreTrainedTokenizerFast:
    before = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    return fast(_sentencepiece_bpe(normalizer=before, decoder=_decoder(strip=True)))


def metaspace(scheme: str, *, split: bool) -> PreTrainedTokenizerFast:
    before = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    return fast(_sentencepiece_bpe(pre_tokenizer=before, decoder=_decoder(strip=True)))


def gemma() -> PreTrainedTokenizerFast:
    tokenizer = _sentencepiece_bpe(
        normalizer=normalizers.Replace(" ", SPACE), decoder=_decoder(strip=False)
    )
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken("\t", normalized=False)])
    return fast(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    pieces = [(name, 0.0) for name in ("<unk>", "<s>", EOS)]
    pieces += [(name, -20.0) for name in BYTES]
    words = {SPACE + word for text in TEXTS for word in text.split()} - {SPACE + EOS}
    letters = {letter for word in words for letter in word}
    pieces += [(word, -6.0) for word in sorted(words)] + [(c, -9.0) for c in sorted(letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = _decoder(strip=True)
    tokenizer.add_special_tokens(["<unk>", "<s>", EOS])
    return fast(tokenizer)


FAMILIES: Mapping[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level BPE (GPT-2, Qwen)": byte_level,
    "byte-level BPE with a prefix space": lambda: byte_level(prefix_space=True),
    "byte-level BPE with added tokens (DeepSeek)": with_added_tokens,
    "rank table (tiktoken, Tekken)": rank_table,
    "SentencePiece BPE, normalizer (Llama 2)": llama,
    "SentencePiece BPE, metaspace first": lambda: metaspace("first", split=False),
    "SentencePiece BPE, metaspace always": lambda: metaspace("always", split=True),
    "SentencePiece BPE, no prefix (Gemma)": gemma,
    "SentencePiece Unigram": unigram,
}
