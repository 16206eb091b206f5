"""The bytes that every id of a tokenizer writes, for any tokenizer whose own rules keep them.

What a tokenizer does is read from its own JSON (normalizer, pre-tokenizer, decoder), never from
the name of its class: byte-level BPE writes bytes in GPT-2's alphabet; SentencePiece writes text
with a mark for the space and `<0xNN>` for bytes that are no piece. Whether a text survived is not
believed but compared, text by text. Shapes: V = ids of the model, padding among them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_Node = dict[str, Any]

BYTE_PIECE: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNREACHABLE: Final = "\uffff"
"""A noncharacter: with it in front, no text spells the name of a special token."""
_SILENT_DECODERS: Final = frozenset({"Fuse", "Strip"})
"""Decoders that move no byte of a token: Strip takes the prefix off a whole text."""


class TokenizerError(ValueError):
    """The tokenizer cannot be read as a table of bytes, or loses bytes of the text."""


@dataclass(frozen=True, slots=True)
class ByteTable:
    """What each id writes, and what the tokenizer writes before every text."""

    pieces: list[bytes]
    """[V] b"" for special tokens, for the unknown token and for ids of a padded vocabulary."""
    prefix: bytes
    """Read before every text, and no part of it: b" " for Llama 2 and Mistral, else mostly b""."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """A tokenizer without its prefix, its post-processing and the names of its specials."""

    backend: Tokenizer
    pieces: list[bytes]
    """As in ByteTable, but as long as the tokenizer has ids."""
    prefix: str


def byte_table(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> ByteTable:
    """Return what each id of the model writes.

    Args: vocab_size: the model's, which may be padded past the tokenizer's own.
    Raises: TokenizerError when the tokenizer's decoder is none whose tokens can be told apart
        as bytes (WordPiece drops white space).
    """
    reading = _reading(tokenizer, len(tokenizer))
    padding = [b""] * (vocab_size - len(reading.pieces))
    return ByteTable((reading.pieces + padding)[:vocab_size], reading.prefix.encode())


def encode(
    tokenizer: PreTrainedTokenizerFast, table: ByteTable, text: str, *, prefixed: bool = True
) -> list[int]:
    """Return the ids of text alone: no special is added, and none is read out of the text.

    Args: table: byte_table of the same tokenizer. prefixed: False reads text as the middle of a
        document, without the tokenizer's prefix.
    Returns: ids whose pieces, joined, are table.prefix (if prefixed) and text; none for no text.
    Raises: TokenizerError when the ids do not spell the text; it names the first byte that differs.
    """
    if not text:
        return []
    reading = _reading(tokenizer, len(tokenizer))
    whole = (reading.prefix if prefixed else "") + text
    ids: list[int] = reading.backend.encode(whole, add_special_tokens=False).ids
    size = len(table.pieces)
    spelled = b"".join(table.pieces[i] if i < size else b"" for i in ids)
    if spelled != whole.encode():
        raise _not_spelled(spelled, whole.encode(), text)
    return ids


def eos_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id that ends every document. Raises TokenizerError when there is none."""
    if tokenizer.eos_token_id is None:
        raise TokenizerError("the tokenizer has no eos token; set one: documents end in it")
    return int(tokenizer.eos_token_id)


def encode_text(
    tokenizer: PreTrainedTokenizerFast, text: str, *, prefixed: bool = True
) -> list[int]:
    """Do as encode, with the table of the tokenizer's own ids."""
    reading = _reading(tokenizer, len(tokenizer))
    table = ByteTable(reading.pieces, reading.prefix.encode())
    return encode(tokenizer, table, text, prefixed=prefixed)


def byte_of_symbol() -> dict[str, int]:
    """GPT-2's table: each byte has one printable character that stands for it."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in set(shown)]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def _not_spelled(spelled: bytes, wanted: bytes, text: str) -> TokenizerError:
    pairs = zip(spelled, wanted, strict=False)
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(spelled), len(wanted)))
    return TokenizerError(
        f"the tokenizer does not give back the text {text[:40]!r}: from byte {same} on it spells "
        f"{spelled[same : same + 12]!r}, the text has {wanted[same : same + 12]!r}; leave the text "
        "out, or write it as the tokenizer keeps it (composed characters, no unknown ones)"
    )


# ---------------------------------------------------------------------------- the tokenizer's JSON
# By identity and size: adding tokens changes the size, and nothing else in a tokenizer is changed.
@lru_cache(maxsize=8)
def _reading(tokenizer: PreTrainedTokenizerFast, size: int) -> _Reading:
    assert size
    spec: _Node = json.loads(tokenizer.backend_tokenizer.to_str())
    special = _special_ids(tokenizer, spec)
    pieces, prefix = _pieces(spec, special), _take_prefix(spec)
    _hide_specials(spec, special)
    spec.update(post_processor=None, truncation=None, padding=None)
    backend = Tokenizer.from_str(json.dumps(spec))
    backend.encode_special_tokens = True
    return _Reading(backend, pieces, prefix)


def _parts(spec: _Node, *names: str) -> Iterator[_Node]:
    """Yield the named normalizers, pre-tokenizers or decoders; those in sequences one by one."""
    todo = [spec[name] for name in names if spec[name]]
    while todo:
        part = todo.pop(0)
        if part["type"] == "Sequence":
            todo = [*next(v for v in part.values() if isinstance(v, list)), *todo]
        else:
            yield part


def _vocabulary(model: _Node) -> dict[str, int]:
    """Return token -> id; Unigram keeps (token, score) in the order of the ids."""
    vocab: dict[str, int] | list[tuple[str, float]] = model["vocab"]
    if isinstance(vocab, dict):
        return vocab
    return {token: index for index, (token, _) in enumerate(vocab)}


def _special_ids(tokenizer: PreTrainedTokenizerFast, spec: _Node) -> set[int]:
    marked = {token["id"] for token in spec["added_tokens"] if token["special"]}
    model = spec["model"]
    unknown = {model.get("unk_id"), _vocabulary(model).get(model.get("unk_token"))}
    # A special token that is named but not in the vocabulary has no id.
    return (marked | set(tokenizer.all_special_ids) | unknown) - {None}


def _pieces(spec: _Node, special: set[int]) -> list[bytes]:
    vocab, added = _vocabulary(spec["model"]), spec["added_tokens"]
    highest = max([*vocab.values(), *(token["id"] for token in added)])
    pieces = [b""] * (highest + 1)
    byte_level = any(
        part["type"] == "ByteLevel"
        for part in _parts(spec, "normalizer", "pre_tokenizer", "decoder")
    )
    alphabet, marks, byte_fallback = byte_of_symbol(), _space_marks(spec), _has_bytes(spec)
    for token, index in vocab.items():
        if not byte_level:
            pieces[index] = _marked_piece(token, marks, byte_fallback)
        elif all(symbol in alphabet for symbol in token):
            pieces[index] = bytes(alphabet[symbol] for symbol in token)
        else:  # no text leads here; the decoder writes such a token as it stands
            pieces[index] = token.encode()
    for token in added:
        pieces[token["id"]] = _marked_piece(token["content"], marks, False)
    for index in special:
        pieces[index] = b""
    return pieces


def _marked_piece(token: str, marks: Mapping[str, str], byte_fallback: bool) -> bytes:
    if byte_fallback and (found := BYTE_PIECE.fullmatch(token)):
        return bytes.fromhex(found[1])
    for mark, meaning in marks.items():
        token = token.replace(mark, meaning)
    return token.encode()


def _has_bytes(spec: _Node) -> bool:
    return any(part["type"] == "ByteFallback" for part in _parts(spec, "decoder"))


def _space_marks(spec: _Node) -> dict[str, str]:
    """Return what the decoder, and the rules before the model, have tokens write otherwise."""
    marks: dict[str, str] = {}
    for part in _parts(spec, "decoder"):
        if part["type"] == "Replace" and "String" in part["pattern"]:
            marks[part["pattern"]["String"]] = part["content"]
        elif part["type"] == "Metaspace":
            marks[part["replacement"]] = " "
        elif part["type"] not in _SILENT_DECODERS | {"ByteLevel", "ByteFallback"}:
            raise TokenizerError(
                f"the tokenizer's decoder has a step {part['type']}, whose tokens do not say which "
                "bytes they write; use a byte-level BPE tokenizer (as of GPT-2, Llama 3, Qwen), or "
                "a SentencePiece one (as of Llama 2, Mistral, Gemma)"
            )
    for part in _parts(spec, "pre_tokenizer"):
        if part["type"] == "Metaspace":
            marks[part["replacement"]] = " "
    return marks


def _take_prefix(spec: _Node) -> str:
    """Take out of the spec what writes something before a text, and return what it writes.

    We write it ourselves, always: some rules leave it out before a text that starts with a space,
    which then cannot be told from the same text without one.
    """
    prefix = ""
    for part in _parts(spec, "pre_tokenizer"):
        if part["type"] == "Metaspace" and part["prepend_scheme"] != "never":
            part["prepend_scheme"], prefix = "never", " "
        if part["type"] == "ByteLevel" and part["add_prefix_space"]:
            part["add_prefix_space"], prefix = False, " "
    for part in _parts(spec, "normalizer"):
        if part["type"] == "Prepend":
            prefix = _marked_piece(part["prepend"], _space_marks(spec), False).decode()
            part["prepend"] = ""
    return prefix


def _hide_specials(spec: _Node, special: set[int]) -> None:
    """Rename the special tokens, so that neither the model nor a search finds them in a text."""
    model, names = spec["model"], {}
    for token, index in _vocabulary(model).items():
        if index in special:
            names[token] = f"{_UNREACHABLE}{index}"
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(t, t): index for t, index in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(token, token), score] for token, score in model["vocab"]]
    if model.get("merges"):
        pairs = (p.split(" ") if isinstance(p, str) else p for p in model["merges"])
        model["merges"] = [(a, b) for a, b in pairs if not names.keys() & {a, b, a + b}]
    if model.get("unk_token"):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for token in spec["added_tokens"]:
        if token["id"] in special:
            token["content"] = f"{_UNREACHABLE}{token['id']}"


def hash_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the sha256 of the tokenizer's own JSON: what turns text into ids, all of it."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
