"""Does the canary gate stop an over-fitted expert, and let one pass that was trained as usual?

    python benchmarks/canary.py [--seeds 20] [--work DIR] [--json]

For each seed: the first hospital of the demo, trained as the demo trains it (`clean`), and trained
on to four times as long (`overfit`); each answers the demo's prompts, and the gate measures the
very file. What was measured before is read back from the folder and judged by the limits that a
policy has by default today, so more seeds cost only what is new. Progress goes to stderr, the
result to stdout: `tpr` (over-fitted experts that were stopped), `fpr` (clean ones that were), their
95 % intervals, the seconds that a gate takes, and, on the first seed, what the planted records cost
the expert.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cofuse.demo.corpora import Department, departments, write_department
from cofuse.demo.settings import DEMO
from fusion.evaluate import bits_per_byte
from fusion.extract import extract_to_file
from participant import canaries
from participant.canary_gate import Question, measure, verdict
from participant.canary_stats import Exposure, share_interval
from participant.config import ModelConfig, TrainingConfig
from participant.policy import GateRules
from participant.stages.cpt import Expert, open_expert

TIMES: Final[Mapping[str, int]] = {"clean": 1, "overfit": 4, "unplanted": 1}
"""How many times the demo's steps; `unplanted` is clean without any record in its text."""
_COST_SEEDS: Final = 1
"""Seeds of which an unplanted expert is trained too."""
RULES: Final = GateRules(canaries="block")
_TOP_K: Final = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One expert: how it is trained, and for which seed."""

    kind: str
    seed: int
    work: Path

    @property
    def folder(self) -> Path:
        """Of its expert; the over-fitted one is the clean one, trained on."""
        return self.work / f"{'unplanted' if self.kind == 'unplanted' else 'planted'}-{self.seed}"

    @property
    def note(self) -> Path:
        """Where its result is kept."""
        return self.folder / f"{self.kind}.json"


def run(case: Case) -> dict[str, Any]:
    """Return what was measured, now or before, and whether it stops the release."""
    if case.note.exists():
        found: dict[str, Any] = json.loads(case.note.read_text(encoding="utf-8"))
    else:
        found = make(case)
        case.note.write_text(json.dumps(found), encoding="utf-8")
    if "exposures" in found:
        exposures = {way: Exposure(**one) for way, one in found["exposures"].items()}
        found["stopped"] = not verdict(RULES, exposures).passed
    return found


def make(case: Case) -> dict[str, Any]:
    """Train the expert and measure its release."""
    folder = case.folder
    texts = texts_of(case)
    expert = train(case, texts[0])
    made = open_expert(expert.directory)
    found: dict[str, Any] = {"bpb": bits_per_byte(*made, texts[0].heldout)}
    if case.kind != "unplanted":
        prompts = [text for department in texts for text in department.public]
        release = folder / f"{case.kind}.safetensors"
        digests = {"prompt_set_sha256": "0" * 64, "model_sha256": "0" * 64}
        extract_to_file(release, *made, prompts, top_k=_TOP_K, **digests)
        question = Question(
            kind="logits",
            release=release,
            model=expert.directory,
            canaries=folder / canaries.FILE,
            texts=prompts,
        )
        began_s = time.perf_counter()
        exposures = measure(question)
        found["gate_s"] = time.perf_counter() - began_s
        found["exposures"] = {way: asdict(one) for way, one in exposures.items()}
    return found


def texts_of(case: Case) -> list[Department]:
    """Return the text of three hospitals, the case's own first."""
    names = [hospital.department for hospital in DEMO.hospitals[:3]]
    return departments(names, case.seed, limits=DEMO.limits)


def train(case: Case, department: Department) -> Expert:
    """Train as the participant's daemon does."""
    folder = case.folder
    corpus = folder / "private.jsonl"
    if not corpus.exists():
        write_department(department, folder)
    model = ModelConfig(**DEMO.hospitals[0].model)
    planted = None if case.kind == "unplanted" else folder / canaries.FILE
    expert = Expert(folder / "expert", corpus, model, planted)
    steps = DEMO.expert_training["steps"] * TIMES[case.kind]
    asked = {**DEMO.expert_training, "steps": steps, "decay_steps": steps // 3}
    expert.pretrain(
        TrainingConfig(**asked, seed=case.seed, checkpoint_every=10_000),
        on_progress=lambda _: None,
        should_stop=lambda: False,
    )
    return expert


def summarise(found: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return rates over the seeds, and what all of it cost."""

    def rate(kind: str) -> dict[str, Any]:
        stopped, of = sum(one["stopped"] for one in found[kind]), len(found[kind])
        low, high = share_interval(stopped, of)
        return {"rate": stopped / of, "stopped": stopped, "of": of, "low": low, "high": high}

    told = {
        kind: {
            f"{way}_{name}": statistics.fmean(
                getattr(Exposure(**one["exposures"][way]), name) for one in found[kind]
            )
            for way in ("release", "recall")
            for name in ("auc", "tpr", "bits")
        }
        for kind in ("clean", "overfit")
    }
    cost = statistics.fmean(
        100 * (with_them["bpb"] / without["bpb"] - 1)
        for with_them, without in zip(found["clean"], found["unplanted"], strict=False)
    )
    overfit, clean = rate("overfit"), rate("clean")
    return {
        "canary": {"tpr": overfit["rate"], "fpr": clean["rate"]},
        "overfit": overfit | told["overfit"],
        "clean": clean | told["clean"],
        "gate_s": statistics.median(o["gate_s"] for k in ("clean", "overfit") for o in found[k]),
        "planting_costs_bpb_pct": cost,
    }


def main(arguments: Iterable[str] | None = None) -> int:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--work", type=Path, help="folder to keep models and results in")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    options = parser.parse_args(None if arguments is None else list(arguments))
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in TIMES}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        for seed in range(options.seeds):
            for kind, results in found.items():
                if kind == "unplanted" and seed >= _COST_SEEDS:
                    continue
                began_s = time.perf_counter()
                results.append(run(Case(kind=kind, seed=seed, work=work)))
                took_s = time.perf_counter() - began_s
                _say(f"seed {seed} {kind}: {_told(results[-1])}, {took_s:.0f} s")
    summary = summarise(found)
    sys.stdout.write(json.dumps(summary, indent=None if options.json else 2) + "\n")
    return 0


def _told(result: Mapping[str, Any]) -> str:
    exposures = result.get("exposures", {})
    figures = [f"{way} tpr {one['tpr']:.2f} auc {one['auc']:.2f}" for way, one in exposures.items()]
    return ", ".join([f"bpb {result['bpb']:.3f}", *figures, f"stopped {result.get('stopped')}"])


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
