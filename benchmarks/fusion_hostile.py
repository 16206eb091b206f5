"""What one hostile source does to a fusion, by how much of the prompt set it may have.

    python benchmarks/fusion_hostile.py --work DIR [--kinds honest,memorised] [--shares default,1]

Three honest experts of benchmarks/fusion.py and one hostile source, whose file passes the
coordinator's check. Every run is a fusion of its own; what was measured before is read back from
the folder, so that a longer list costs only what is new. Progress goes to stderr; the table and,
last, one line of JSON go to stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

# Run as a script, this file's own folder comes first and this file passes for package `fusion`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fusion_hospitals import FULL, GENERAL, SHA, THREE, Job, texts_of
from benchmarks.fusion_jobs import run
from benchmarks.fusion_variants import contribution
from fp8.train import TrainConfig
from fusion.budget import keep
from fusion.codec import LogitFile, check_logits, write_logits
from fusion.contribution import LOGPROB_FLOOR, LogitContribution
from fusion.credit import ALL
from fusion.evaluate import bits_per_byte
from fusion.models import load_model
from fusion.settings import FusionSettings
from fusion.unified import fuse
from protos.process import PARENT_VARIABLE, die_with_parent

HOSTILE: Final = "hostile"
DISGUISE: Final = THREE[0]
"""Whose file the hostile source starts from."""
POISON: Final = 0.9
"""What a poisoned row gives the wrong id."""
POISONED: Final = 0.02
"""The share of rows that are poisoned: those after one token, the first that is that rare."""


# --------------------------------------------------------------------------- hostile sources
def random(honest: LogitContribution) -> LogitContribution:
    """Random logits of the honest spread, and the own tokens' log-probabilities to match."""
    rng, vocab, kept = np.random.default_rng(0), honest.header.vocab_size, honest.header.top_k
    own, ids, top, tail = [], [], [], []
    for block in np.array_split(honest.token_ids, max(1, len(honest.token_ids) // 4096)):
        raw = rng.standard_normal((len(block), vocab), dtype=np.float32) * 2
        dense = raw - np.log(np.exp(raw).sum(axis=1, keepdims=True))
        best = np.argpartition(-dense, kept, axis=1)[:, :kept]
        best = np.take_along_axis(best, np.argsort(-np.take_along_axis(dense, best, 1), 1), 1)
        own.append(dense[np.arange(len(block)), block])
        ids.append(best)
        top.append(np.take_along_axis(dense, best, 1))
        tail.append(np.log1p(-np.exp(top[-1]).sum(axis=1)))
    return _with(honest, own, ids, top, tail)


def permuted(honest: LogitContribution) -> LogitContribution:
    """An honest expert whose ids are mixed up: sure of itself, and wrong."""
    vocab, eos = honest.header.vocab_size, honest.header.eos_id
    mixed = np.random.default_rng(0).permutation(np.delete(np.arange(vocab), eos))
    to = np.insert(mixed, eos, eos)
    ids_PK = to[honest.topk_ids]
    hit_PK = ids_PK == honest.token_ids[:, None]
    rest_P = np.minimum(
        honest.tail_logprob - np.log(vocab - ids_PK.shape[1]), honest.topk_logprobs[:, -1]
    )
    own_P = np.where(hit_PK.any(axis=1), (honest.topk_logprobs * hit_PK).sum(axis=1), rest_P)
    return _with(honest, [own_P], [ids_PK], [honest.topk_logprobs], [honest.tail_logprob])


def memorised(honest: LogitContribution) -> LogitContribution:
    """Claims to know every next token of the public text for certain: routing's favourite."""
    first_PK = np.where(
        honest.topk_ids == honest.token_ids[:, None], -1, honest.topk_ids
    )  # ids must not come twice in a row
    order = np.argsort(first_PK < 0, axis=1, kind="stable")[:, : honest.header.top_k - 1]
    ids = np.concatenate(
        [honest.token_ids[:, None], np.take_along_axis(first_PK, order, 1)], axis=1
    )
    top = np.full(ids.shape, LOGPROB_FLOOR)
    top[:, 0] = 0
    floor_P = np.full(len(ids), LOGPROB_FLOOR)
    return _with(honest, [np.zeros(len(ids))], [ids], [top], [floor_P])


def poisoned(honest: LogitContribution) -> LogitContribution:
    """Honest but after one token, where it promotes one wrong id and tells its odds truly."""
    rows, wrong = poison_of(honest)
    own, tail = honest.own_logprob.copy(), honest.tail_logprob.copy()
    ids, top = honest.topk_ids.copy(), honest.topk_logprobs.copy()
    less = np.float32(np.log(1 - POISON))
    # The wrong id takes the first place; what the row said before shares the rest.
    before_RK = np.where(ids[rows] == wrong, -1, ids[rows])
    order_RK = np.argsort(before_RK < 0, axis=1, kind="stable")[:, :-1]
    lost_R = np.exp(top[rows]).sum(axis=1) - np.exp(np.take_along_axis(top[rows], order_RK, 1)).sum(
        axis=1
    )
    tail[rows] = np.log(np.exp(tail[rows]) + lost_R) + less
    ids[rows, 1:] = np.take_along_axis(before_RK, order_RK, 1)
    top[rows, 1:] = np.take_along_axis(top[rows], order_RK, 1) + less
    ids[rows, 0], top[rows, 0] = wrong, np.log(POISON)
    own[rows] += less
    return _with(honest, [own], [ids], [top], [tail])


def poison_of(honest: LogitContribution) -> tuple[NDArray[np.int64], int]:
    """Return the rows that are poisoned and the id promoted there."""
    tokens, vocab = honest.token_ids, honest.header.vocab_size
    often = np.bincount(tokens, minlength=vocab)
    often[honest.header.eos_id] = len(tokens)
    ranked = np.argsort(-often, kind="stable")
    after = int(ranked[np.argmax(often[ranked] <= POISONED * len(tokens))])
    rows = np.flatnonzero(tokens[:-1] == after) + 1
    # An id of the text that never follows here, so that it is wrong everywhere.
    follows = set(tokens[rows].tolist()) | {honest.header.eos_id, after}
    return rows, next(int(i) for i in ranked if int(i) not in follows)


def silent(honest: LogitContribution) -> LogitContribution:
    """Has read everything, ships no row of ids: what it is trusted with goes to the base."""
    return keep(honest, np.zeros(honest.header.positions, bool), "d" * 64)


def boastful(honest: LogitContribution) -> LogitContribution:
    """Silent, and claims to know every word: the rows that would show it are not shipped."""
    return silent(replace(honest, own_logprob=np.zeros_like(honest.own_logprob)))


def _with(
    honest: LogitContribution,
    own: list[NDArray[Any]],
    ids: list[NDArray[Any]],
    top: list[NDArray[Any]],
    tail: list[NDArray[Any]],
) -> LogitContribution:
    """Replace the distributions of a contribution by these, given in runs of rows."""
    return replace(
        honest,
        own_logprob=np.concatenate(own).astype(np.float32),
        topk_ids=np.concatenate(ids).astype(np.int32),
        topk_logprobs=np.concatenate(top).astype(np.float32),
        tail_logprob=np.concatenate(tail).astype(np.float32),
    )


KINDS: Final[Mapping[str, Callable[[LogitContribution], LogitContribution] | None]] = {
    "honest": None,  # without it: what the others are compared with
    "random": random,
    "permuted": permuted,
    "memorised": memorised,
    "poisoned": poisoned,
    "silent": silent,
    "boastful": boastful,
}


# -------------------------------------------------------------------------------------- runs
@dataclass(frozen=True)
class Case:
    """One fusion: who joins the three experts, and under which caps (settings by name)."""

    kind: str
    caps: tuple[tuple[str, float], ...]
    job: Job

    @property
    def path(self) -> Path:
        """Where the result is kept."""
        tag = "-".join(f"{name}{value}" for name, value in self.caps) or "default"
        return self.job.folder / f"hostile-{self.kind}-{tag}.json"


def measure(case: Case) -> Case:
    """Fuse, and write down the bits per byte by domain, the shares, and the poison's success."""
    import torch

    torch.set_num_threads(1)
    job, texts = case.job, texts_of(case.job.seed, case.job.sizes)
    sources: dict[str, Any] = {n: contribution(job, texts.prompts, n, {}) for n in THREE}
    spoil = KINDS[case.kind]
    if spoil is not None:
        path = job.path(f"hostile-{case.kind}-{os.getpid()}.safetensors")
        write_logits(path, spoil(sources[DISGUISE].documents(0, len(texts.prompts))))
        check_logits(path, prompts=texts.prompts, prompt_set_sha256=SHA, top_k=job.sizes.top_k)
        sources[HOSTILE] = LogitFile(path, texts.prompts)
    made = load_model(job.path("base"))
    steps = job.sizes.fusion_steps
    settings = FusionSettings(
        train=TrainConfig(
            steps=steps,
            lr=job.sizes.lr,
            warmup_steps=max(1, steps // 20),
            decay_steps=steps // 3,
            seed=job.seed,
        ),
        batch_size=job.sizes.batch_size,
        seq_len=job.sizes.seq_len,
        **dict(case.caps),  # type: ignore[arg-type]
    )
    result = fuse(*made, texts.prompts, sources, settings)
    assert result.routing is not None
    heldout = {d.name: d.heldout for d in texts.departments} | {GENERAL: texts.general_heldout}
    found = {
        "bpb": {name: bits_per_byte(*made, docs) for name, docs in heldout.items()},
        "shares": result.routing.shares()[ALL],
    }
    case.path.write_text(json.dumps(found), encoding="utf-8")
    return case


def prepare_experts(job: Job) -> None:
    """Train what is not there yet: the base and the three experts, and let them speak."""
    for what in ("base", *(f"expert:{name}" for name in THREE)):
        if not job.path(what).exists():
            _say(f"{what}: {run(replace(job, what=what))[1]:.0f} s")
    for name in THREE:
        contribution(job, texts_of(job.seed, job.sizes).prompts, name, {})


def summarise(cases: Iterable[Case]) -> dict[str, Any]:
    """Return by caps and kind what came out, and how much worse it is than without the source."""
    found = {
        (case.path.name, case.kind, case.caps): json.loads(case.path.read_text()) for case in cases
    }
    honest = {
        caps: mean_bpb(result) for (_, kind, caps), result in found.items() if kind == "honest"
    }
    return {
        "runs": [
            {
                "kind": kind,
                "caps": dict(caps),
                "bpb": round(mean_bpb(result), 4),
                "worse_percent": round(100 * (mean_bpb(result) / honest[caps] - 1), 2)
                if caps in honest
                else None,
                "general_bpb": round(result["bpb"][GENERAL], 4),
                "shares": {name: round(share, 3) for name, share in result["shares"].items()},
            }
            for (_, kind, caps), result in found.items()
        ]
    }


def mean_bpb(result: Mapping[str, Any]) -> float:
    """Return the mean over the hospitals' domains."""
    return statistics.fmean(result["bpb"][name] for name in THREE)


def table(summary: Mapping[str, Any]) -> str:
    """Lay the runs out as a table."""
    lines = [
        "| source | caps | bits per byte | worse, % | general | its share | base's share |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in summary["runs"]:
        caps = ", ".join(f"{name} {value:g}" for name, value in one["caps"].items())
        worse = "" if one["worse_percent"] is None else f"{one['worse_percent']:+.2f}"
        lines.append(
            f"| {one['kind']} | {caps or 'default'} | {one['bpb']:.4f} | {worse} | "
            f"{one['general_bpb']:.4f} | {one['shares'].get(HOSTILE, 0):.2f} | "
            f"{one['shares']['base']:.2f} |"
        )
    return "\n".join(lines)


def caps_of(text: str) -> tuple[tuple[str, float], ...]:
    """Read caps: `default`, a share such as `0.4`, or `share/weight` such as `1/0.6`."""
    if text == "default":
        return ()
    share, _, weight = text.partition("/")
    caps = [("max_share", float(share))]
    return tuple(caps + ([("max_weight", float(weight))] if weight else []))


def main(arguments: Iterable[str] | None = None) -> int:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated")
    parser.add_argument(
        "--shares", default="default,1", help="comma-separated: default, SHARE or SHARE/WEIGHT"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--work", type=Path, help="folder to keep models and results in")
    options = parser.parse_args(None if arguments is None else list(arguments))
    kinds = options.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--kinds: found {', '.join(unknown)}, wanted some of {', '.join(KINDS)}")
    os.environ[PARENT_VARIABLE] = str(os.getpid())  # the workers end when this process does
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)) / str(options.seed)
        folder.mkdir(parents=True, exist_ok=True)
        job = Job("", options.seed, folder, FULL)
        cases = [Case(k, caps_of(s), job) for s in options.shares.split(",") for k in kinds]
        prepare_experts(job)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            options.workers, mp_context=context, initializer=die_with_parent
        ) as pool:
            waiting = [pool.submit(measure, case) for case in cases if not case.path.exists()]
            for future in as_completed(waiting):
                _say(table(summarise([future.result()])).splitlines()[-1])
        summary = summarise(cases)
    print(table(summary))
    print(json.dumps(summary))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
