"""What the guard costs beside the work it guards: checking texts, and writing a file anew.

    python benchmarks/guard.py [--documents 400] [--hidden 256] [--json]

A small model's top 16 log-probabilities on text of random words are extracted to a file; the file
is then checked and written anew, and the text held against a corpus of the same size and against
the patterns of a person's data. Figures are seconds of this process' CPU time, so that others at
work on the machine do not count. overhead_pct: all of the guard's against the extraction's alone;
a larger model makes it smaller, a GPU larger. mb_per_s: of the file that is written anew.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

# Run as a script, this file's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from fusion.codec import rewrite_logits
from fusion.extract import extract_to_file
from fusion.models import ModelSpec, build_model, train_tokenizer
from participant.prompt_checks import fingerprints, overlapping, personal

SHA = "0" * 64
_T = TypeVar("_T")


def texts(documents: int) -> list[str]:
    """Documents of 200 words out of 4,000."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 9))) for _ in range(4000)]
    return [" ".join(rng.choices(words, k=200)) for _ in range(documents)]


def timed(work: Callable[[], _T]) -> tuple[float, _T]:
    """Seconds of CPU time, and the result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def measure(documents: int, hidden: int, folder: Path) -> dict[str, float]:
    """All figures of one size."""
    prompts = texts(documents)
    tokenizer = train_tokenizer(prompts, 8000)
    spec = ModelSpec(
        architecture="llama", hidden_size=hidden, layers=4, heads=4, vocab_size=len(tokenizer)
    )
    model, file = build_model(spec, 0), folder / "draft"
    extracting, header = timed(
        lambda: extract_to_file(
            file, model, tokenizer, prompts, top_k=16, prompt_set_sha256=SHA, model_sha256=SHA
        )
    )
    rewriting, _ = timed(
        lambda: rewrite_logits(
            file, folder / "sealed", prompts=prompts, prompt_set_sha256=SHA, top_k=16
        )
    )
    reading, known = timed(lambda: np.unique(np.concatenate([fingerprints(t) for t in prompts])))
    checking, _ = timed(lambda: (overlapping(prompts, known), personal(prompts)))
    return {
        "positions": header.positions,
        "parameters": model.num_parameters(),
        "extract_s": extracting,
        "rewrite_s": rewriting,
        "check_s": checking,
        "corpus_words_per_s": documents * 200 / reading,
        "mb_per_s": file.stat().st_size / rewriting / 1e6,
        "overhead_pct": 100 * (rewriting + checking) / extracting,
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.documents, arguments.hidden, Path(folder))
    for name, value in found.items():
        print(f"{name:<20} {value:,.2f}", file=sys.stderr if arguments.json else sys.stdout)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
