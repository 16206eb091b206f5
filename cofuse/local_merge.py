"""Method merge of a local fusion: models of the pivot's own architecture, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping

from cofuse.local_models import Kind, LocalInputError, Model
from cofuse.local_spec import LocalSpec
from coordinator.merging import merge_settings
from fusion.contribution import ContributionError
from fusion.delta_file import check_delta
from fusion.merge_files import MergeReport, merge_directories
from fusion.merge_fit import check_tensors, check_vocabulary, twins_of
from fusion.model_folder import open_model
from protos.spec import RoundSpec


def check_merge(spec: LocalSpec, pivot: Model, kinds: Mapping[str, Kind]) -> None:
    """Compare names, shapes and vocabularies; no weight of a model is read.

    Args: kinds: by source; all alike.
    Raises: MergeError, LocalInputError.
    """
    assert isinstance(spec.round, RoundSpec)
    settings = merge_settings(spec.round)
    if "model" not in kinds.values():
        _check_deltas(spec, pivot)
        return
    settings.shares(sorted(kinds))
    base = open_model(spec.pivot)
    twins = twins_of(base)
    for name, path in spec.sources.items():
        folder = open_model(path)
        check_vocabulary(base, name, folder)
        check_tensors(base, name, folder, twins)


def _check_deltas(spec: LocalSpec, pivot: Model) -> None:
    digest = pivot.digest()
    for name, path in spec.sources.items():
        try:
            check_delta(path, pivot_sha256=digest, shapes=pivot.shapes)
        except ContributionError as error:
            raise LocalInputError(f"sources.{name}: {path}: {error}") from error


def try_merge(spec: LocalSpec, kinds: Mapping[str, Kind]) -> MergeReport | None:
    """Merge without writing, for the statistics.

    Returns: None when there are no models to merge, or the merge reads the models' gradients.
    """
    if not isinstance(spec.round, RoundSpec) or spec.round.method != "merge":
        return None
    if "model" not in kinds.values() or spec.round.merge == "fisher":
        return None
    nowhere = spec.pivot / "never-written"
    settings = merge_settings(spec.round)
    return merge_directories(spec.pivot, spec.sources, nowhere, settings, dry_run=True)
