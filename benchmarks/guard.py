"""What the guard costs beside the work it guards: checks, a file written anew, sealed, and audited.

    python benchmarks/guard.py [--documents 400] [--hidden 256] [--json]

A small model's top 16 log-probabilities on text of random words are extracted to a file; the text
is held against a corpus of the same size and against the patterns of a person's data, the file is
checked, written anew and sealed to the fusion worker, and four records go onto the audit chain.

Seconds of this process' CPU time, so that others at work on the machine do not count; the audit's
are seconds on the clock, as it waits for the disk. overhead_pct: all of it against the extraction
alone; a larger model makes it smaller, a GPU larger. mb_per_s: sealing, of a file of 256 MB.
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
from trust.audit import AuditLog
from trust.chain import Entry
from trust.seal import seal_file
from trust.seal_keys import Recipient, load_recipient, new_pair, save_recipient

SHA = "0" * 64
LARGE_BYTES = 256_000_000
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
            file, folder / "plain", prompts=prompts, prompt_set_sha256=SHA, top_k=16
        )
    )
    recipient = _recipient(folder)
    sealing, _ = timed(lambda: seal_file(folder / "plain", folder / "out", recipient))
    audit_s = _audited(folder / "audit")
    reading, known = timed(lambda: np.unique(np.concatenate([fingerprints(t) for t in prompts])))
    checking, _ = timed(lambda: (overlapping(prompts, known), personal(prompts)))
    return {
        "positions": header.positions,
        "parameters": model.num_parameters(),
        "extract_s": extracting,
        "rewrite_s": rewriting,
        "check_s": checking,
        "corpus_words_per_s": documents * 200 / reading,
        "seal_s": sealing,
        "audit_s": audit_s,
        "rewrite_mb_per_s": file.stat().st_size / rewriting / 1e6,
        "mb_per_s": _sealed_per_s(folder, recipient),
        "overhead_pct": 100 * (rewriting + checking + sealing + audit_s) / extracting,
    }


def _recipient(folder: Path) -> Recipient:
    new_pair(folder / "key.pem")
    save_recipient(folder / "key.pem", folder / "public.pem")
    return load_recipient(folder / "public.pem")


def _sealed_per_s(folder: Path, recipient: Recipient) -> float:
    """MB sealed in a second of CPU time."""
    with (folder / "large").open("wb") as file:
        file.truncate(LARGE_BYTES)
    seconds, _ = timed(lambda: seal_file(folder / "large", folder / "out", recipient))
    return LARGE_BYTES / seconds / 1e6


def _audited(folder: Path) -> float:
    """Seconds on the clock for the records of one release, each synced."""
    log = AuditLog(folder, "cofuse://participant/a")
    start = time.perf_counter()
    for act in ("policy.loaded", "release.intent", "release.delivered", "release.intent"):
        log.append(
            Entry(actor="cofuse://participant/a", act=act, obj="rnd-1", data={"sha256": SHA})
        )
    return time.perf_counter() - start


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
