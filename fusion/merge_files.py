"""Merge Hugging Face model directories tensor by tensor, without loading any of the models.

Names and shapes decide what belongs together; all of them are compared before a value is read.
Of each tensor the base's and the sources' values are held, and no other tensor's. The directory
appears whole or not at all, with the base's config and tokenizer, its dtypes and its files.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fp8.block_layout import BLOCK, CONFIG_FILE, INDEX_FILE, SCALE_SUFFIX
from fp8.model_directory import draft_of
from fp8.quantize import quantize
from fp8.recipe import BlockScaling
from fusion.merge import merge_tensor
from fusion.merge_fit import check_tensors, check_vocabulary, twins_of
from fusion.merge_methods import Array
from fusion.merge_report import MergeReport, TensorReport, agreements
from fusion.merge_settings import MergeError, MergeSettings
from fusion.model_folder import (
    DTYPES,
    FP8,
    ModelFolder,
    SafetensorsFile,
    open_model,
    open_tensors,
)

REPORT_FILE: Final = "merge.json"
_COMPANIONS: Final = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Suffixes of what is copied from the base: config, tokenizer, chat template."""
OnProgress = Callable[[int, int, str], None]
"""Told of tensors done, tensors in all, and the one just done."""
Put = Callable[[str, Tensor], None]
"""Writes one tensor."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What was found to fit together."""

    base: ModelFolder
    sources: Mapping[str, ModelFolder]
    fisher: Mapping[str, ModelFolder] | None
    settings: MergeSettings
    twins: Mapping[str, str]
    """Heads that are their embedding, which is read in their place."""
    notes: list[str]
    fp8: bool

    def dtype(self, name: str) -> str:
        """Return the dtype that a tensor is written in, FP8 layers in theirs."""
        stored = self.base.tensors[name]
        if stored.dtype != FP8 or self.fp8:
            return stored.dtype
        wanted = str(self.base.config.get("dtype") or self.base.config.get("torch_dtype"))
        return {"float32": "F32", "float16": "F16"}.get(wanted, "BF16")

    def layout(self, name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return what a tensor is written as: itself, and its scales in FP8."""
        shape, dtype = self.base.tensors[name].shape, self.dtype(name)
        if dtype != FP8:
            return {name: (dtype, shape)}
        tiles = tuple(-(-side // BLOCK) for side in shape)
        return {name: (dtype, shape), _scale_of(name): ("F32", tiles)}


def merge_directories(
    base_dir: Path,
    sources: Mapping[str, Path],
    out: Path,
    settings: MergeSettings,
    *,
    fisher: Mapping[str, Path] | None = None,
    on_progress: OnProgress | None = None,
    dry_run: bool = False,
    fp8: bool = False,
) -> MergeReport:
    """Write base + merged deltas as a model directory; the same call gives the same bytes.

    Args:
        base_dir: a model directory, which gives names, dtypes, config and tokenizer.
        sources: by name, model directories trained from the base; plain or block-FP8.
        out: the directory to make; it must not hold anything yet. merge.json in it is the report.
        settings: how to merge.
        fisher: by source, files or directories of Fisher information, for method fisher.
        on_progress: told after each tensor.
        dry_run: compute everything for the report, and write nothing.
        fp8: write what is block-FP8 in the base as that again; else in the base config's dtype.
    Raises: MergeError when models, tokenizers or settings do not fit, or a value is not finite;
        ExportError when `out` is taken or FP8 values are damaged. Nothing is written then.
    """
    plan = _plan(base_dir, sources, settings, fisher, fp8)
    weights = settings.effective_weights(sorted(sources))
    made: list[TensorReport] = []

    def make(names: list[str], put: Put) -> None:
        for name in names:
            make_one = _merge_one if plan.base.tensors[name].floats else _copy_one
            made.append(make_one(plan, name, put))
            if on_progress is not None:
                on_progress(len(made), len(plan.base.tensors), name)

    if dry_run:
        make(list(plan.base.tensors), lambda _name, _tensor: None)
        return _report(None, plan, weights, made)
    with draft_of(out) as draft:
        for file, names in _by_file(plan.base).items():
            layout = {n: entry for name in names for n, entry in plan.layout(name).items()}
            with SafetensorsFile(draft / file, layout) as written:
                make(names, written.put)
        _write_companions(plan, draft)
        report = _report(out, plan, weights, made)
        text = json.dumps(report.described(), indent=1)
        (draft / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    return report


def _report(
    out: Path | None, plan: _Plan, weights: Mapping[str, float], made: list[TensorReport]
) -> MergeReport:
    return MergeReport(
        path=out, settings=plan.settings, weights=weights, tensors=made, notes=plan.notes
    )


# ------------------------------------------------------------------------------ what fits
def _plan(
    base_dir: Path,
    sources: Mapping[str, Path],
    settings: MergeSettings,
    fisher: Mapping[str, Path] | None,
    fp8: bool,
) -> _Plan:
    """Open everything and compare names, shapes and vocabularies; no weight is read."""
    base = open_model(base_dir)
    folders = {name: open_model(sources[name]) for name in sorted(sources)}
    settings.shares(list(folders))
    if fp8 and not base.scales:
        raise MergeError(f"{base_dir} is not block-FP8; export the merged model with fp8.export")
    twins, notes = twins_of(base), list[str]()
    for name, folder in folders.items():
        check_vocabulary(base, name, folder)
        notes += check_tensors(base, name, folder, twins)
    information = None
    if (fisher is not None) != (settings.method == "fisher"):
        raise MergeError("Fisher information goes with method fisher, and only with it")
    if fisher is not None:
        if fisher.keys() != sources.keys():
            raise MergeError(
                f"fisher and sources differ in {sorted(fisher.keys() ^ sources.keys())}"
            )
        information = {name: open_tensors(fisher[name]) for name in sorted(fisher)}
        for name, folder in information.items():
            check_tensors(base, f"the Fisher information of {name}", folder, twins)
    return _Plan(base, folders, information, settings, twins, notes, fp8)


# ------------------------------------------------------------------------------ the values
def _copy_one(plan: _Plan, name: str, put: Put) -> TensorReport:
    stored, value = plan.base.tensors[name], plan.base.read(name)
    for source, folder in plan.sources.items():
        if not torch.equal(folder.read(name), value):
            plan.notes.append(f"{name} ({stored.dtype}) of {source} differs; the base's is kept")
    put(name, value)
    return TensorReport(name, stored.dtype, stored.shape, merged=False)


def _merge_one(plan: _Plan, name: str, put: Put) -> TensorReport:
    # A tied head is merged as the embedding it is: random drops go by the tensor's name.
    source_name = plan.twins.get(name, name)
    base = _values("the base", plan.base, source_name)
    deltas = {}
    for source, folder in plan.sources.items():
        deltas[source] = _values(source, folder, source_name)
        np.subtract(deltas[source], base, out=deltas[source])
    information = None
    if plan.fisher is not None:
        information = {
            source: _values(f"the Fisher information of {source}", folder, source_name)
            for source, folder in plan.fisher.items()
        }
    merged = merge_tensor(source_name, deltas, plan.settings, fisher=information, base=base)
    dtype, shape = plan.dtype(name), plan.base.tensors[name].shape
    found = agreements(deltas, merged)
    deltas.clear()
    np.add(merged, base, out=merged)
    value = torch.from_numpy(merged)
    if dtype == FP8:
        coded = quantize(value.float(), BlockScaling(block=BLOCK).weight)
        put(name, coded.codes)
        put(_scale_of(name), coded.scale)
    else:
        value = value.to(DTYPES[dtype])
        if not bool(value.isfinite().all()):
            raise MergeError(f"{name} leaves the range of {dtype} when merged; lower the weights")
        put(name, value)
    return TensorReport(name, dtype, shape, merged=True, sources=found)


def _values(source: str, folder: ModelFolder, name: str) -> Array:
    """Read one tensor as floats of our own, in at least 32 bits."""
    tensor = folder.read(name)
    if not bool(tensor.isfinite().all()):
        raise MergeError(f"{name} of {source} holds NaN or infinity ({folder.path}); export anew")
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return np.array(tensor.to(wide).numpy())


# ------------------------------------------------------------------------------ the rest
def _by_file(base: ModelFolder) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, stored in base.tensors.items():
        found.setdefault(stored.file.name, []).append(name)
    return found


def _write_companions(plan: _Plan, draft: Path) -> None:
    """Copy config and tokenizer, and write an index where the base has one."""
    base = plan.base
    for file in sorted(base.path.iterdir()):
        if file.is_file() and file.suffix in _COMPANIONS and file.name != REPORT_FILE:
            shutil.copyfile(file, draft / file.name)
    if base.scales and not plan.fp8:
        config: dict[str, Any] = {
            k: v for k, v in base.config.items() if k != "quantization_config"
        }
        text = json.dumps(config, indent=2, sort_keys=True)
        (draft / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    if (base.path / INDEX_FILE).exists():
        where, size = {}, 0
        for name, stored in base.tensors.items():
            for written, (dtype, shape) in plan.layout(name).items():
                where[written] = stored.file.name
                size += int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (draft / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _scale_of(name: str) -> str:
    return name.removesuffix(".weight") + SCALE_SUFFIX


__all__ = ["REPORT_FILE", "MergeReport", "merge_directories"]
