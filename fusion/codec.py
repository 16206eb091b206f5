"""The files that leave a participant: log-probabilities and weight deltas, as checked safetensors.

A contribution file holds typed arrays and a JSON header, nothing that runs. Whatever arrives is
hostile until check_logits or check_delta has read all of it.
Shapes: D = documents, P = positions (tokens, each document's eos among them), K = kept ids,
V = vocabulary. Log-probabilities are in nats, float16: a step of 2**-10 of their size.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CODEC_VERSION: Final = 1
LOGPROB_FLOOR: Final = -60.0
"""Smaller log-probabilities (below 1e-26) are stored as this, so that every value is finite."""
MASS_TOLERANCE: Final = 0.01
"""How far a row's probabilities may sum from 1: float16 moves each by at most 0.3 %."""
MAX_HEADER_BYTES: Final = 1 << 24

Code = Literal[
    "truncated",
    "malformed",
    "not_finite",
    "mass",
    "wrong_k",
    "id_out_of_vocabulary",
    "wrong_prompt_set",
    "wrong_pivot",
    "wrong_shape",
    "missing_tensor",
    "unknown_tensor",
]


class ContributionError(ValueError):
    """A contribution file is not what the round asked for; `code` names how."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitHeader:
    """What a logits contribution says of itself. Hashes are lower-case hex sha256."""

    codec_version: int
    prompt_set_sha256: str
    tokenizer_sha256: str
    model_sha256: str
    vocab_size: int
    top_k: int
    documents: int
    positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitContribution:
    """One expert's view of a prompt set.

    Row p is the distribution over token p given the tokens before it in its document (its first
    row: given eos as start). The last row of a document is its eos.
    """

    header: LogitHeader
    doc_offsets: NDArray[np.int64]
    """[D+1] first row of each document; the last entry is P."""
    token_ids: NDArray[np.int32]
    """[P] the text's own tokens."""
    byte_ends: NDArray[np.int32]
    """[P] bytes of the document read once token p is."""
    own_logprob: NDArray[np.float16]
    """[P] log-probability of token_ids[p]."""
    topk_ids: NDArray[np.int32]
    """[P, K] the likeliest ids, likeliest first."""
    topk_logprobs: NDArray[np.float16]
    """[P, K] their log-probabilities."""
    tail_logprob: NDArray[np.float16]
    """[P] log of all the other ids' mass together."""
    vocab_bytes: NDArray[np.uint8]
    """The bytes of every id, one after the other."""
    vocab_offsets: NDArray[np.int64]
    """[V+1] where each id's bytes start; specials have none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaHeader:
    """What a weights contribution says of itself."""

    codec_version: int
    pivot_sha256: str
    steps: int
    tokens: int


_LOGIT_DTYPES: Final[Mapping[str, str]] = {
    "doc_offsets": "int64",
    "token_ids": "int32",
    "byte_ends": "int32",
    "own_logprob": "float16",
    "topk_ids": "int32",
    "topk_logprobs": "float16",
    "tail_logprob": "float16",
    "vocab_bytes": "uint8",
    "vocab_offsets": "int64",
}
_ITEM_BYTES: Final[Mapping[str, int]] = {"I64": 8, "I32": 4, "F32": 4, "F16": 2, "U8": 1}
_DTYPE_NAMES: Final[Mapping[str, str]] = {
    "I64": "int64",
    "I32": "int32",
    "F32": "float32",
    "F16": "float16",
    "U8": "uint8",
}
_UNREADABLE: Final = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    OverflowError,
    RecursionError,
)
_Header = TypeVar("_Header", LogitHeader, DeltaHeader)


# ---------------------------------------------------------------------------- writing, reading
def write_logits(path: Path, contribution: LogitContribution) -> None:
    """Write a contribution; the file appears whole or not at all."""
    arrays = {name: getattr(contribution, name) for name in _LOGIT_DTYPES}
    _write(path, arrays, contribution.header)


def read_logits(path: Path) -> LogitContribution:
    """Read a contribution that check_logits has accepted. Raises ContributionError."""
    layout, header = _read_layout(path, LogitHeader)
    _require_names(layout, _LOGIT_DTYPES)
    return LogitContribution(header=header, **_read_arrays(path))


def write_delta(
    path: Path,
    delta: Mapping[str, NDArray[np.float32]],
    *,
    pivot_sha256: str,
    steps: int,
    tokens: int,
) -> None:
    """Write the difference of a trained pivot's parameters from the pivot's own.

    Args: steps, tokens: how long it was trained on private text.
    """
    header = DeltaHeader(
        codec_version=CODEC_VERSION, pivot_sha256=pivot_sha256, steps=steps, tokens=tokens
    )
    _write(path, delta, header)


def read_delta(path: Path) -> tuple[DeltaHeader, dict[str, NDArray[np.float32]]]:
    """Read a delta that check_delta has accepted. Raises ContributionError."""
    _, header = _read_layout(path, DeltaHeader)
    return header, _read_arrays(path)


# ---------------------------------------------------------------------------- checking
def check_logits(
    path: Path,
    *,
    prompt_set_sha256: str,
    top_k: int,
    prompts_bytes: Sequence[bytes] | None = None,
) -> LogitHeader:
    """Read a contribution to the last value and refuse anything the round did not ask for.

    Args: prompts_bytes: the prompt set's documents in UTF-8; given, the tokens must spell them.
    Raises: ContributionError, whose code says what is wrong and whose text says what to do.
    """
    layout, header = _read_layout(path, LogitHeader)
    _require_names(layout, _LOGIT_DTYPES)
    if header.prompt_set_sha256 != prompt_set_sha256:
        raise ContributionError(
            "wrong_prompt_set",
            f"computed on prompt set {header.prompt_set_sha256[:12]}, this round's is "
            f"{prompt_set_sha256[:12]}: pull the round's prompt set and compute again",
        )
    if header.top_k != top_k:
        raise ContributionError(
            "wrong_k", f"holds top {header.top_k}, the round asks for {top_k}: export again"
        )
    _check_logit_layout(layout, header)
    contribution = read_logits(path)
    _check_documents(contribution, prompts_bytes)
    _check_numbers(contribution)
    return header


def check_delta(
    path: Path, *, pivot_sha256: str, shapes: Mapping[str, tuple[int, ...]]
) -> DeltaHeader:
    """Read a delta to the last value and refuse what does not fit the pivot.

    Args: shapes: the pivot's parameters by name.
    Raises: ContributionError, whose code says what is wrong and whose text says what to do.
    """
    layout, header = _read_layout(path, DeltaHeader)
    if header.pivot_sha256 != pivot_sha256:
        raise ContributionError(
            "wrong_pivot",
            f"trained from pivot {header.pivot_sha256[:12]}, this round's is "
            f"{pivot_sha256[:12]}: pull the round's pivot and train again",
        )
    if missing := sorted(shapes.keys() - layout.keys()):
        raise ContributionError(
            "missing_tensor", f"{missing[:3]} are missing: ship every parameter of the pivot"
        )
    if unknown := sorted(layout.keys() - shapes.keys()):
        raise ContributionError(
            "unknown_tensor", f"{unknown[:3]} are no parameters of the pivot: leave them out"
        )
    for name, (dtype, shape) in layout.items():
        if dtype != "float32" or shape != tuple(shapes[name]):
            raise ContributionError(
                "wrong_shape",
                f"{name} is {dtype} {shape}, wanted float32 {tuple(shapes[name])}: "
                "train the round's pivot, not another model",
            )
    for name, values in _read_arrays(path).items():
        _require_finite(name, values)
    return header


def _check_logit_layout(
    layout: Mapping[str, tuple[str, tuple[int, ...]]], header: LogitHeader
) -> None:
    documents, positions, k = header.documents, header.positions, header.top_k
    if not (0 < documents <= positions and 0 < k <= header.vocab_size):
        raise _malformed(f"counts do not fit together in {header}")
    wanted = {
        "doc_offsets": (documents + 1,),
        "vocab_offsets": (header.vocab_size + 1,),
        "topk_ids": (positions, k),
        "topk_logprobs": (positions, k),
        "vocab_bytes": layout["vocab_bytes"][1],
    }
    for name, dtype in _LOGIT_DTYPES.items():
        shape = wanted.get(name, (positions,))
        if layout[name] != (dtype, shape) or len(shape) > 2:
            found = f"{layout[name][0]} {layout[name][1]}"
            raise _malformed(f"{name} is {found}, wanted {dtype} {shape}")
    if len(layout["vocab_bytes"][1]) != 1:
        raise _malformed("vocab_bytes is not flat")


def _check_documents(contribution: LogitContribution, prompts: Sequence[bytes] | None) -> None:
    """Check that the tokens spell their documents and that each ends in the one eos."""
    c, header = contribution, contribution.header
    _require_offsets("doc_offsets", c.doc_offsets, header.positions, strictly=True)
    _require_offsets("vocab_offsets", c.vocab_offsets, c.vocab_bytes.size, strictly=False)
    for name, ids in (("token_ids", c.token_ids), ("topk_ids", c.topk_ids)):
        if ids.min() < 0 or ids.max() >= header.vocab_size:
            raise ContributionError(
                "id_out_of_vocabulary",
                f"{name} holds {ids.min()}..{ids.max()}, the vocabulary has 0.."
                f"{header.vocab_size - 1}: export with the tokenizer the expert was trained with",
            )
    lengths = np.diff(c.vocab_offsets)[c.token_ids]
    last = c.doc_offsets[1:] - 1
    inner = np.ones(header.positions, dtype=bool)
    inner[last] = False
    if np.unique(c.token_ids[last]).size != 1 or lengths[last].any():
        raise _malformed("not every document ends in one eos that writes no bytes")
    if (lengths[inner] == 0).any():
        raise _malformed("a token inside a document writes no bytes")
    total = np.cumsum(lengths)
    before = np.concatenate([[0], total[last[:-1]]])
    within = total - np.repeat(before, np.diff(c.doc_offsets))
    if not np.array_equal(within, c.byte_ends):
        raise _malformed("byte_ends is not the running sum of the tokens' bytes")
    if prompts is not None:
        _require_spelling(c, lengths, prompts)


def _require_spelling(
    contribution: LogitContribution, lengths: NDArray[np.int64], prompts: Sequence[bytes]
) -> None:
    c = contribution
    sizes = np.asarray([len(prompt) for prompt in prompts])
    if len(prompts) != c.header.documents or (c.byte_ends[c.doc_offsets[1:] - 1] != sizes).any():
        raise _malformed(
            f"{c.header.documents} documents of {int(lengths.sum())} bytes, the prompt set has "
            f"{len(prompts)} of {int(sizes.sum())}"
        )
    start = np.repeat(c.vocab_offsets[:-1][c.token_ids], lengths)
    inside = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if c.vocab_bytes[start + inside].tobytes() != b"".join(prompts):
        raise _malformed("the tokens do not spell the prompt set")


def _check_numbers(contribution: LogitContribution) -> None:
    """Check that every row is a distribution: finite, at most 1, sorted, distinct, whole."""
    c = contribution
    for name in ("own_logprob", "topk_logprobs", "tail_logprob"):
        values = getattr(c, name)
        _require_finite(name, values)
        if values.max() > 0:
            raise _malformed(f"{name} holds {values.max()}: log-probabilities are at most 0")
    if (np.diff(c.topk_logprobs, axis=1) > 0).any():
        raise _malformed("topk_logprobs is not sorted, likeliest first")
    if (np.diff(np.sort(c.topk_ids, axis=1), axis=1) == 0).any():
        raise _malformed("topk_ids holds an id twice in one row")
    top = c.topk_logprobs.astype(np.float32)
    mass = np.exp(top).sum(axis=1) + np.exp(c.tail_logprob.astype(np.float32))
    worst = float(np.abs(mass - 1).max())
    if worst > MASS_TOLERANCE:
        raise ContributionError(
            "mass",
            f"a row's probabilities sum to 1 +- {worst:.3f}, wanted within {MASS_TOLERANCE}: ship "
            "log-softmax over the whole vocabulary at temperature 1, never renormalised",
        )
    hit = c.topk_ids == c.token_ids[:, None]
    own = np.where(hit.any(axis=1), (top * hit).sum(axis=1), np.minimum(c.own_logprob, top[:, -1]))
    if (own != c.own_logprob).any():
        raise _malformed("own_logprob contradicts the row's top ids")


def _require_finite(name: str, values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise ContributionError(
            "not_finite", f"{name} holds NaN or infinity: the model diverged; train it again"
        )


def _require_offsets(name: str, values: NDArray[np.int64], end: int, *, strictly: bool) -> None:
    steps = np.diff(values)
    if values[0] != 0 or values[-1] != end or (steps < (1 if strictly else 0)).any():
        raise _malformed(f"{name} does not rise from 0 to {end}")


def _require_names(
    layout: Mapping[str, tuple[str, tuple[int, ...]]], wanted: Mapping[str, str]
) -> None:
    if layout.keys() != wanted.keys():
        raise _malformed(f"holds arrays {sorted(layout)[:12]}, wanted {sorted(wanted)}")


def _malformed(found: str) -> ContributionError:
    return ContributionError("malformed", f"{found}: export the contribution again")


# ---------------------------------------------------------------------------- the file
def _write(
    path: Path, arrays: Mapping[str, NDArray[Any]], header: LogitHeader | DeltaHeader
) -> None:
    partial = path.with_name(path.name + ".partial")
    metadata = {"format": type(header).__name__, "header": json.dumps(asdict(header))}
    save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, partial, metadata=metadata)
    os.replace(partial, path)


def _read_arrays(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _malformed(f"unreadable arrays ({error})") from error


def _read_layout(
    path: Path, header_type: type[_Header]
) -> tuple[dict[str, tuple[str, tuple[int, ...]]], _Header]:
    """Read dtypes, shapes and header without touching the arrays; the sizes must add up."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or (length <= MAX_HEADER_BYTES and size < 8 + length):
            raise _truncated(size, 8 + length)
        if length > MAX_HEADER_BYTES:
            raise _malformed(f"the file's header claims {length} bytes")
        raw = file.read(length)
    try:
        table = json.loads(raw)
        metadata = table.pop("__metadata__")
        layout = {name: _entry(entry) for name, entry in table.items()}
        end = max(int(entry["data_offsets"][1]) for entry in table.values())
        header = _parse_header(metadata, header_type)
    except _UNREADABLE as error:
        raise _malformed(f"unreadable header ({type(error).__name__}: {error})") from error
    if size < 8 + length + end:
        raise _truncated(size, 8 + length + end)
    if size != 8 + length + end:
        raise _malformed(f"{size - 8 - length - end} bytes after the last array")
    return layout, header


def _entry(entry: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    dtype, shape = str(entry["dtype"]), tuple(int(side) for side in entry["shape"])
    begin, end = (int(offset) for offset in entry["data_offsets"])
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(f"{end - begin} bytes for {dtype} {shape}")
    return _DTYPE_NAMES[dtype], shape


def _parse_header(metadata: Mapping[str, str], header_type: type[_Header]) -> _Header:
    if metadata["format"] != header_type.__name__:
        raise ValueError(f"format {metadata['format']!r}, wanted {header_type.__name__!r}")
    values = json.loads(metadata["header"])
    kinds = {field.name: {"int": int, "str": str}[str(field.type)] for field in fields(header_type)}
    if values.keys() != kinds.keys():
        raise ValueError(f"header keys {sorted(values)}, wanted {sorted(kinds)}")
    for name, kind in kinds.items():
        if type(values[name]) is not kind or (kind is int and values[name] < 0):
            raise ValueError(f"header {name} is {values[name]!r}")
    if values["codec_version"] != CODEC_VERSION:
        raise ValueError(f"codec version {values['codec_version']}, this reads {CODEC_VERSION}")
    return header_type(**values)


def _truncated(found: int, wanted: int) -> ContributionError:
    return ContributionError(
        "truncated", f"{found} bytes, its header promises {wanted}: upload the file again"
    )
