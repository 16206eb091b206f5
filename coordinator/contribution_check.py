"""Whether a contribution is what its round asked for: the whole file is read, to the last value."""

from pathlib import Path

from coordinator.opening import Wanted
from fusion.codec import check_asked, check_logits
from fusion.contribution import ContributionError
from fusion.delta_file import check_delta
from fusion.pair_file import PreferenceError, read_pairs
from fusion.pair_scores import read_scores
from protos.public_sets import read_prompts
from trust.safetensors_header import read_header


def check(path: Path, wanted: Wanted) -> None:
    """Return when the file is a contribution to the round. Raises: ContributionError, OSError."""
    spec, asked = wanted.spec, wanted.public_set
    if spec.kind == "weights" or spec.public_set is None or asked is None:
        tensors = read_header(wanted.weights).tensors
        shapes = {name: entry.shape for name, entry in tensors.items()}
        check_delta(path, pivot_sha256=wanted.pivot_sha256, shapes=shapes)
    elif spec.kind == "pairs":
        try:
            read_scores(path, read_pairs(asked).pairs)
        except PreferenceError as error:
            raise ContributionError("malformed", str(error).replace(str(path), "it")) from error
    else:
        header = check_logits(
            path,
            prompts=[text.encode() for text in read_prompts(asked)],
            prompt_set_sha256=spec.public_set.removeprefix("sha256:"),
            top_k=spec.top_k,
        )
        check_asked(
            header,
            sampler=spec.sampler,
            draws=spec.draws,
            share=spec.ship_share,
            pivot_sha256=wanted.pivot_sha256,
        )
