"""One of five participants poisons: how much worse is the pivot, and is the poisoner named?

    python benchmarks/poisoning.py [--work DIR] [--attacks shuffle,flip,scale,trigger] [--json]

Four honest experts and one poisoner, whose file passes the coordinator's check. For each attack the
round is fused as it is by default (suspects are left out) and, with --undefended, as it would be if
nobody looked. `loss_increase_pct` compares with the pivot of the four honest ones: mean bits per
byte over their domains. `honest` is the same with an honest fifth, who must be no suspect. What
was measured before is read back from the folder. Progress goes to stderr, the result to stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

# Run as a script, this file's own folder comes first and this file passes for package `fusion`.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.fusion_hospitals import FULL, GENERAL, SHA, SIX, Job, Sizes, texts_of
from benchmarks.fusion_jobs import run
from benchmarks.fusion_variants import contribution
from benchmarks.poison_attacks import ATTACKS
from cofuse.demo.corpora import Limits
from fp8.train import TrainConfig
from fusion.codec import LogitFile, check_logits, write_logits
from fusion.contribution import LogitContribution
from fusion.evaluate import bits_per_byte
from fusion.models import ModelSpec, load_model
from fusion.settings import FusionSettings
from fusion.unified import fuse

FIVE: Final = SIX[:5]
HONEST, POISONER = FIVE[:4], FIVE[4]
WITHOUT: Final = "without"
_SHAPE: Final[Mapping[str, Any]] = {"hidden_size": 96, "layers": 3, "heads": 4}
SMALL: Final[Sizes] = replace(
    FULL,
    limits=Limits(private=150_000, public=25_000, heldout=12_000, questions=1),
    general_bytes=200_000,
    general_prompts_bytes=60_000,
    experts=(
        ModelSpec(architecture="llama", vocab_size=768, **_SHAPE),
        ModelSpec(architecture="qwen2", vocab_size=896, **_SHAPE),
        ModelSpec(architecture="gpt_neox", vocab_size=640, **_SHAPE),
    ),
    pivot=ModelSpec(architecture="llama", vocab_size=768, **_SHAPE),
    expert_steps=200,
    base_steps=200,
    fusion_steps=200,
)


@dataclass(frozen=True, slots=True)
class Case:
    """One fusion: what the fifth participant does, and what becomes of suspects."""

    attack: str
    """A key of ATTACKS; `honest`, or WITHOUT: it is not there."""
    suspects: Literal["exclude", "report"]
    job: Job

    @property
    def path(self) -> Path:
        """Where the result is kept."""
        return self.job.folder / f"poison-{self.attack}-{self.suspects}.json"


def measure(case: Case) -> dict[str, Any]:
    """Fuse, unless that was done before; return bits per byte by domain and the judgement."""
    if case.path.exists():
        kept: dict[str, Any] = json.loads(case.path.read_text(encoding="utf-8"))
        return kept
    job, sizes = case.job, case.job.sizes
    texts = texts_of(job.seed, sizes, FIVE)
    sources: dict[str, Any] = {n: contribution(job, texts.prompts, n, {}) for n in HONEST}
    made = load_model(job.path("base"))
    if case.attack != WITHOUT:
        honest = contribution(job, texts.prompts, POISONER, {})
        sources[POISONER] = honest
        if spoil := ATTACKS.get(case.attack):
            whole = honest.documents(0, len(texts.prompts))
            sources[POISONER] = spoiled(job, spoil(whole), case.attack, texts.prompts)
    settings = FusionSettings(
        train=TrainConfig(
            steps=sizes.fusion_steps,
            lr=sizes.lr,
            warmup_steps=max(1, sizes.fusion_steps // 20),
            decay_steps=sizes.fusion_steps // 3,
            seed=job.seed,
        ),
        batch_size=sizes.batch_size,
        seq_len=sizes.seq_len,
        suspects=case.suspects,
    )
    result = fuse(*made, texts.prompts, sources, settings)
    assert result.routing is not None
    heldout = {d.name: d.heldout for d in texts.departments if d.name in HONEST}
    heldout[GENERAL] = texts.general_heldout
    found = {
        "bpb": {name: bits_per_byte(*made, docs) for name, docs in heldout.items()},
        "judged": result.routing.judged(),
        "excluded": result.routing.excluded,
    }
    case.path.write_text(json.dumps(found), encoding="utf-8")
    return found


def spoiled(job: Job, poison: LogitContribution, name: str, prompts: Sequence[str]) -> LogitFile:
    """Write the poison as a file, and let the coordinator's check pass it."""
    path = job.path(f"poison-{name}.safetensors")
    write_logits(path, poison)
    check_logits(path, prompts=prompts, prompt_set_sha256=SHA, top_k=job.sizes.top_k)
    return LogitFile(path, prompts)


def prepare_experts(job: Job) -> None:
    """Train what is not there yet: the base and five experts."""
    for what in ("base", *(f"expert:{name}" for name in FIVE)):
        if not job.path(what).exists():
            _say(f"{what}: {run(replace(job, what=what))[1]:.0f} s")


def summarise(found: Mapping[Case, Mapping[str, Any]]) -> dict[str, Any]:
    """Return by attack how much worse the pivot is, and whether the poisoner was named."""
    without = next(mean_bpb(one) for case, one in found.items() if case.attack == WITHOUT)

    def worse(one: Mapping[str, Any]) -> float:
        return round(100 * (mean_bpb(one) / without - 1), 3)

    by = {(case.attack, case.suspects): one for case, one in found.items()}
    defended = {attack: one for (attack, mode), one in by.items() if mode == "exclude"}
    defended.pop(WITHOUT)
    return {
        "poisoning": {attack: worse(one) for attack, one in defended.items() if attack in ATTACKS},
        "honest_fifth_pct": {a: worse(one) for a, one in defended.items() if a not in ATTACKS},
        "undefended_pct": {a: worse(one) for (a, mode), one in by.items() if mode == "report"},
        "named": {attack: list(one["excluded"]) for attack, one in defended.items()},
        "signs": {attack: one["judged"] for attack, one in defended.items()},
        "bpb_without": without,
    }


def mean_bpb(result: Mapping[str, Any]) -> float:
    """Return the mean over the honest participants' domains."""
    return statistics.fmean(result["bpb"][name] for name in HONEST)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run what was asked for and print it; exit 1 where an attack does more harm than 2 %."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--attacks", default=",".join(ATTACKS), help="comma-separated")
    parser.add_argument("--undefended", action="store_true", help="also with nobody looking")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="folder to keep models and results in")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args(None if arguments is None else list(arguments))
    attacks = options.attacks.split(",")
    if unknown := [name for name in attacks if name not in ATTACKS]:
        parser.error(f"--attacks: found {', '.join(unknown)}, wanted some of {', '.join(ATTACKS)}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.work or Path(temporary)) / str(options.seed)
        folder.mkdir(parents=True, exist_ok=True)
        job = Job("", options.seed, folder, SMALL)
        prepare_experts(job)
        cases = [Case(attack, "exclude", job) for attack in (WITHOUT, *attacks, "honest")]
        if options.undefended:
            cases += [Case(attack, "report", job) for attack in attacks]
        found = {}
        for case in cases:
            found[case] = one = measure(case)
            _say(f"{case.attack} {case.suspects}: {mean_bpb(one):.4f}, without {one['excluded']}")
    summary = summarise(found)
    sys.stdout.write(json.dumps(summary, indent=None if options.json else 2) + "\n")
    return int(max(summary["poisoning"].values()) > 2)


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
