"""From copies of the pivot, or deltas of it, to one pivot: merged once, or by an outer step."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from fusion.fisher import fisher_on_texts
from fusion.merge import MERGES, MergeSettings, State, merge, subtract
from fusion.models import load_model, load_parameter_arrays, parameter_arrays, save_model
from fusion.outer import OuterSettings, load_outer, outer_step, save_outer
from protos.chunks import sha256_of
from protos.spec import RoundSpec

OUTER_FILE: Final = "outer.safetensors"
"""What the outer optimizer remembers, beside the weights of the pivot that it made."""


def write_merged(
    spec: RoundSpec, pivot: Path, deltas: Mapping[str, State], texts: Sequence[str], out: Path
) -> None:
    """Write the model folder that the deltas of a pivot make, merged as the spec says.

    Args: pivot: its model folder, with what an outer optimizer remembers, if it does. deltas: by
        source. texts: the prompt set, on which merge fisher measures each source; others need none.
    Raises: MergeError when they do not fit.
    """
    model, tokenizer = load_model(pivot)
    base = parameter_arrays(model)
    if spec.outer is None:
        fisher: dict[str, State] = {}
        if spec.merge == "fisher":
            for name, delta in deltas.items():
                load_parameter_arrays(model, {key: base[key] + delta[key] for key in base})
                how = {"seq_len": spec.training.seq_len, "seed": spec.seed}
                fisher[name] = fisher_on_texts(model, tokenizer, texts, **how)
        load_parameter_arrays(
            model, merge(base, deltas, merge_settings(spec), fisher=fisher or None)
        )
        return save_model(model, tokenizer, out)
    settings, memory = OuterSettings(method=spec.outer), pivot / OUTER_FILE
    state = None
    if memory.exists():
        digest = sha256_of(pivot / "model.safetensors")
        state = load_outer(memory, settings, pivot_sha256=digest)
    stepped, after = outer_step(base, deltas, settings, state)
    load_parameter_arrays(model, stepped)
    save_model(model, tokenizer, out)
    digest = sha256_of(out / "model.safetensors")
    save_outer(out / OUTER_FILE, after, settings, pivot_sha256=digest)
    return None


def copies_as_deltas(pivot: Path, copies: Mapping[str, Path]) -> dict[str, State]:
    """Return by source what its fused copy of the pivot, a model folder, changed."""
    base = parameter_arrays(load_model(pivot)[0])
    return {
        name: subtract(parameter_arrays(load_model(path)[0]), base) for name, path in copies.items()
    }


def merge_settings(spec: RoundSpec) -> MergeSettings:
    """How a spec merges; its seed goes to the methods that drop entries at random."""
    seed = spec.seed if "seed" in MERGES[spec.merge].defaults else None
    return MergeSettings(
        method=spec.merge, weight=spec.merge_weight, density=spec.merge_density, seed=seed
    )
