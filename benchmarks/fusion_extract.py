"""What it costs to extract logits: time against a bare forward, bytes per token, memory.

    python benchmarks/fusion_extract.py

Three shapes of model, one of them real. Both arms run in turns, each in the batches that suit it,
and the ratio of their CPU times is the median over the turns. Memory is measured in processes of
their own. A table on stdout, and last one line of JSON.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first and this file passes for package `fusion`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion.byte_tables import byte_table, encode
from fusion.codec import write_logits
from fusion.contribution import CODEC_VERSION, LogitContribution, LogitHeader
from fusion.extract import Options, extract_to_file
from fusion.models import ModelSpec, build_model, eos_id, train_tokenizer
from fusion.scoring import LOGITS_AT_ONCE, TOKENS_PER_BATCH, batches, windows_of

SHAPES: Final = {
    "small": (4_096, 256, 6),
    "smollm2": (49_152, 576, 30),
    "lopsided": (49_152, 256, 6),
}
"""Vocabulary, width and layers. smollm2 is the shape of a real model (SmolLM2-135M); lopsided has
its vocabulary on a body of a tenth: there what extraction adds weighs as much as it ever does."""
LARGE_VOCABULARY: Final = 151_936
OPTIONS: Final[Options] = {
    "top_k": 16,
    "prompt_set_sha256": "0" * 64,
    "model_sha256": "0" * 64,
}
TURNS: Final = 3
PROMPTS: Final = 1_000
"""70,000 tokens or so: more than one shard."""


def texts(count: int, seed: int = 0) -> list[str]:
    """Made-up documents of 10 to 60 words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(800)]
    return [" ".join(rng.choices(words, k=rng.randint(10, 60))) for _ in range(count)]


def model_and_tokenizer(
    vocab: int, hidden: int = 256, layers: int = 6
) -> tuple[PreTrainedModel, Any]:
    """A model whose vocabulary is padded to `vocab` behind a small tokenizer's."""
    tokenizer = train_tokenizer(texts(200), 1_000)
    spec = ModelSpec(
        architecture="llama", hidden_size=hidden, layers=layers, heads=4, vocab_size=vocab
    )
    return build_model(spec, 0), tokenizer


def seconds_of_forward(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> float:
    """CPU seconds of encoding the prompts and of asking the model for all of their logits.

    Like lengths share a batch, whose logits are as few as suit malloc: larger ones take longer.
    """
    start = time.process_time()
    vocab = int(model.config.vocab_size)
    table, eos = byte_table(tokenizer, vocab), eos_id(tokenizer)
    streams = [[eos, *encode(tokenizer, table, prompt), eos] for prompt in prompts]
    windows = [w for at, ids in enumerate(streams) for w in windows_of(at, ids, len(ids))]
    model.eval()
    for batch in batches(windows, min(TOKENS_PER_BATCH, LOGITS_AT_ONCE // vocab)):
        ids_BT = pad_sequence([torch.tensor(w.ids[:-1]) for w in batch], batch_first=True)
        with torch.inference_mode():
            model(ids_BT, use_cache=False)
    return time.process_time() - start


def seconds_of_extraction(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], path: Path
) -> float:
    """CPU seconds of everything from the prompts to the file on disk."""
    start = time.process_time()
    extract_to_file(path, model, tokenizer, prompts, **OPTIONS)
    return time.process_time() - start


def extract_ratio(vocab: int, hidden: int, layers: int, prompts: int = 80) -> float:
    """Tokens per second of extraction against those of the bare forward."""
    model, tokenizer = model_and_tokenizer(vocab, hidden, layers)
    asked = texts(prompts)
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(TURNS + 1):
            bare = seconds_of_forward(model, tokenizer, asked)
            ratios.append(bare / seconds_of_extraction(model, tokenizer, asked, Path(folder) / "c"))
    return statistics.median(ratios[1:])


def bytes_per_token(top_k: int, rows: int = 1_000) -> float:
    """Bytes of a real file per token at V = 151,936, without what is shipped once."""
    sizes = [_file_size(top_k, documents, rows) for documents in (1, 2)]
    # The table of the vocabulary and the header are in both; 8 bytes tell where a document starts.
    return (sizes[1] - sizes[0]) / rows


def _file_size(top_k: int, documents: int, rows: int) -> int:
    positions, rng = documents * rows, np.random.default_rng(0)
    share = np.full((positions, top_k), -np.log(top_k + 1), np.float32)
    ids = np.tile(np.asarray([1] * (rows - 1) + [0], np.int32), documents)
    ends = np.tile(np.minimum(np.arange(1, rows + 1), rows - 1).astype(np.int32), documents)
    pieces = [b"", *(str(index).encode() for index in range(1, LARGE_VOCABULARY))]
    contribution = LogitContribution(
        header=LogitHeader(
            codec_version=CODEC_VERSION,
            prompt_set_sha256="0" * 64,
            tokenizer_sha256="0" * 64,
            model_sha256="0" * 64,
            pivot_sha256="",
            sampler="top_k",
            draws=0,
            vocab_size=LARGE_VOCABULARY,
            top_k=top_k,
            documents=documents,
            positions=positions,
            shipped=positions,
            eos_id=0,
            prefix_bytes=0,
        ),
        doc_offsets=np.arange(documents + 1) * rows,
        token_ids=ids,
        byte_ends=ends,
        own_logprob=share[:, 0],
        topk_ids=rng.integers(2, LARGE_VOCABULARY, (positions, top_k), dtype=np.int32),
        topk_logprobs=share,
        tail_logprob=share[:, 0],
        vocab_bytes=np.frombuffer(b"".join(pieces), np.uint8),
        vocab_offsets=np.cumsum([0, *map(len, pieces)]),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c"
        write_logits(path, replace(contribution))
        raw = path.read_bytes()
    return len(raw) - int.from_bytes(raw[:8], "little")


def rss_growth_mib(prompts: int = PROMPTS) -> float:
    """MiB by which extraction of four times the prompts peaks higher, in processes of its own."""
    peaks = []
    for count in (prompts, 4 * prompts):
        done = subprocess.run(
            [sys.executable, __file__, "--peak", str(count)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(float(done.stdout))
    return peaks[1] - peaks[0]


def _peak_mib(count: int) -> float:
    torch.set_num_threads(1)
    model, tokenizer = model_and_tokenizer(1_024, hidden=64, layers=1)
    asked = texts(4 * PROMPTS)[:count]  # as much text is held in either case
    with tempfile.TemporaryDirectory() as folder:
        extract_to_file(Path(folder) / "c", model, tokenizer, asked, **OPTIONS)
    # Not ru_maxrss: on Linux a child starts at the peak of the process that it was forked from.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure_extract() -> dict[str, Any]:
    """Measure everything. extract_ratio is the worst over SHAPES."""
    ratios = {name: extract_ratio(*shape) for name, shape in SHAPES.items()}
    return {
        "extract_ratio": min(ratios.values()),
        "extract_ratios": ratios,
        "bytes_per_token": {f"k{k}": bytes_per_token(k) for k in (8, 16, 32, 64)},
        "rss_growth_mib": rss_growth_mib(),
    }


def main(argv: Sequence[str]) -> int:
    """Print the table and the JSON."""
    if argv[:1] == ["--peak"]:
        print(_peak_mib(int(argv[1])))
        return 0
    found = measure_extract()
    for name, ratio in found["extract_ratios"].items():
        print(f"{name:>11}: extraction at {ratio:.3f} of a bare forward's tokens/s")
    for name, size in found["bytes_per_token"].items():
        print(f"{name:>11}: {size:.2f} bytes per token at V = {LARGE_VOCABULARY}")
    print(
        f"     memory: {found['rss_growth_mib']:+.1f} MiB from {PROMPTS} to {4 * PROMPTS} prompts"
    )
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
