"""One training run over log-probabilities, in the fusion worker: unified, pairwise or a control."""

from collections.abc import Callable

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from coordinator.fuse_job import FuseJob
from coordinator.fusion_runs import Run, settings_of
from coordinator.pivot_card import json_text
from fp8.train import Progress
from fusion.codec import LogitFile
from fusion.unified import fuse
from protos.public_sets import read_prompt_set


def distil(
    job: FuseJob,
    run: Run,
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerFast],
    on_progress: Callable[[Progress], None],
) -> list[float]:
    """Train the pivot in place on what the sources think of the prompt set; return the losses.

    Args: loaded: the pivot, as it was before.
    """
    assert job.prompts is not None
    out = job.directory / "runs" / run.name
    prompts = read_prompt_set(job.prompts)
    texts = [prompt.text for prompt in prompts]
    standing = {name: one.weight for name, one in job.standing.items() if name in run.sources}
    result = fuse(
        *loaded,
        texts,
        {name: LogitFile(job.contributions[name], texts) for name in run.sources},
        settings_of(job.spec, {**run.changes, "standing": standing}),
        written=[prompt.written for prompt in prompts],
        checkpoint_dir=out / "checkpoint",
        on_progress=on_progress,
    )
    if result.routing is not None:
        told = [prompt.domain for prompt in prompts]
        known = [domain for domain in told if domain is not None]
        shares = result.routing.shares(known if len(known) == len(told) else None)
        (out / "shares.json").write_text(json_text(shares), encoding="utf-8")
        judged = json_text(result.routing.judged())
        (out / "suspicion.json").write_text(judged, encoding="utf-8")
    return result.train.losses
