"""Whether a contribution is what its round asked for: the whole file is read, to the last value."""

from pathlib import Path

from coordinator.opening import Wanted
from fusion.codec import check_asked, check_logits
from fusion.delta_file import check_delta
from protos.public_sets import read_prompts
from trust.safetensors_header import read_header


def check(path: Path, wanted: Wanted) -> None:
    """Return when the file is a contribution to the round. Raises: ContributionError, OSError."""
    spec = wanted.spec
    if spec.kind == "weights" or spec.prompts is None or wanted.prompts is None:
        tensors = read_header(wanted.weights).tensors
        shapes = {name: entry.shape for name, entry in tensors.items()}
        check_delta(path, pivot_sha256=wanted.pivot_sha256, shapes=shapes)
        return
    header = check_logits(
        path,
        prompts=[text.encode() for text in read_prompts(wanted.prompts)],
        prompt_set_sha256=spec.prompts.removeprefix("sha256:"),
        top_k=spec.top_k,
    )
    check_asked(
        header,
        sampler=spec.sampler,
        draws=spec.draws,
        share=spec.ship_share,
        pivot_sha256=wanted.pivot_sha256,
    )
