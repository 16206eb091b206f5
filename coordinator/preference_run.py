"""One training run of a preference fusion, in the fusion worker: pairs, scores and a pivot."""

import json
from collections.abc import Callable, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from coordinator.fuse_job import FuseJob
from coordinator.fusion_runs import Run
from coordinator.pivot_card import json_text
from fp8.train import Progress, TrainConfig
from fusion.models import context_length
from fusion.pair_credit import judgement
from fusion.pair_file import PairFile, counts, read_pairs, share_by_domain
from fusion.pair_scores import PairScores, read_scores
from fusion.pair_scoring import prefers_chosen, score_pairs
from fusion.pair_tokens import readable
from fusion.preference import PreferenceSettings, fuse_preferences
from protos.spec import RoundSpec

_PREFERRED: Final = "preferred.json"


def settings_of(spec: RoundSpec) -> PreferenceSettings:
    """The spec's numbers as fusion wants them."""
    return PreferenceSettings(
        train=TrainConfig(**spec.training.schedule(spec.seed)),
        batch_size=spec.training.batch_size,
        **spec.preference.model_dump(exclude={"held_out"}),
        fp8=spec.precision == "fp8",
    )


def prefer(
    job: FuseJob,
    run: Run,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerFast],
    on_progress: Callable[[Progress], None],
) -> list[float]:
    """Train the pivot in place on the pairs that are not held out; return the losses.

    What was measured lies beside the run's checkpoint: judgement.json and preferred.json.
    Args: loaded: the pivot, as it was before.
    """
    assert job.pairs is not None
    settings, out = settings_of(job.spec), job.directory / "runs" / run.name
    model, tokenizer = loaded
    file, read = readable(job.pairs, tokenizer, context_length(model))
    held = file.held_out(job.spec.preference.held_out, job.spec.seed)
    trained = [not one for one in held]
    scores = _scores(job, run, read)
    before = score_pairs(model, tokenizer, file.pairs)
    learned = {name: one.of(trained) for name, one in scores.items()}
    result = fuse_preferences(
        model,
        tokenizer,
        list(compress(file.pairs, trained)),
        learned,
        settings,
        base=before.of(trained),
        checkpoint_dir=out / "checkpoint",
        on_progress=on_progress,
    )
    after = score_pairs(model, tokenizer, file.pairs)
    measured = {"base": before, **{f"expert:{n}": one for n, one in scores.items()}}
    measured[run.name] = after
    _write(out / "judgement.json", judgement(before.of(trained), learned, settings))
    _write(
        out / _PREFERRED,
        {
            "preference": {
                name: share_by_domain(
                    prefers_chosen(one, before, settings.length), file.domains, held
                )
                for name, one in measured.items()
            },
            "pairs": _counted(file, held),
        },
    )
    return result.losses


def _scores(job: FuseJob, run: Run, read: Sequence[bool]) -> dict[str, PairScores]:
    """What each source says of the pairs that the pivot reads; it was asked about all."""
    assert job.pairs is not None
    pairs = read_pairs(job.pairs).pairs
    return {name: read_scores(job.contributions[name], pairs).of(read) for name in run.sources}


def _counted(file: PairFile, held: Sequence[bool]) -> dict[str, Any]:
    return {
        "learned": len(held) - sum(held),
        "held_out": {
            name: list(compress(file.domains, held)).count(name)
            for name in sorted(set(compress(file.domains, held)))
        },
        "skipped": counts(file.skipped),
    }


def told(job: FuseJob, runs: Sequence[Run]) -> dict[str, Any]:
    """What evals.json tells of a preference fusion: the pairs, and held-out ones by model."""
    if job.spec.kind != "pairs":
        return {}
    files = [job.directory / "runs" / run.name / _PREFERRED for run in runs]
    # The pivot's own run is the first, and knows the sources as well.
    whole, *controls = (json.loads(path.read_text(encoding="utf-8")) for path in files)
    table = {name: row for one in (*controls, whole) for name, row in one["preference"].items()}
    # With nothing held out there is nothing to tell.
    return {**whole, "preference": {name: row for name, row in table.items() if row}}


def _write(path: Path, value: Any) -> None:
    path.write_text(json_text(value), encoding="utf-8")
