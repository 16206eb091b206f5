"""The targets of a whole prompt set on disk, so that memory does not grow with it.

Arrays are written shard by shard and read back by the rows of a batch. Row p belongs to token p
of the pivot's stream. Shapes: P = rows, B = windows of a batch, T = tokens of a window.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fp8.batches import IGNORED
from fusion.objective import FusionBatch
from fusion.targets import Arrays
from fusion.windows import PADDING, positions_of

_DONE: Final = "targets.json"


class TargetStore:
    """The pivot's token stream and, row by row, what to learn besides it."""

    def __init__(
        self,
        stream: NDArray[np.integer[Any]],
        arrays: Mapping[str, NDArray[Any]] = MappingProxyType({}),
        shared: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> None:
        self.stream = stream
        """[P + 1] eos, then the documents; row p reads stream[p] and predicts stream[p + 1]."""
        self._arrays = arrays
        self._shared = {name: torch.from_numpy(np.array(a)) for name, a in shared.items()}

    @property
    def offsets(self) -> NDArray[np.int64]:
        """[D + 1] first row of each document, the last entry P: every document ends in eos."""
        return np.flatnonzero(self.stream == self.stream[0])

    def batch(self, rows_BT: Tensor) -> FusionBatch:
        """Read the batch of these rows, [B, T] int64, whatever lies beside whatever."""
        rows = rows_BT.numpy()
        targets = {name: torch.from_numpy(array[rows]) for name, array in self._arrays.items()}
        inputs, labels = self.stream[rows], self.stream[rows + 1]
        return FusionBatch(
            torch.from_numpy(inputs.astype(np.int64)),
            torch.from_numpy(labels.astype(np.int64)),
            targets,
            self._shared,
        )

    def batch_apart(self, rows_BT: Tensor) -> FusionBatch:
        """Read the batch of these rows or PADDING, in which no document reads another."""
        batch = self.batch(rows_BT.clamp_min(0))
        labels_BT = batch.labels.masked_fill(rows_BT == PADDING, IGNORED)
        return replace(batch, labels=labels_BT, positions=positions_of(rows_BT, self.offsets))


def write_targets(
    folder: Path,
    rows: int,
    shards: Iterable[Arrays],
    origin: str,
    shared: Arrays | None = None,
) -> None:
    """Write the shards one after the other; together they have `rows` rows.

    A folder that was written whole is marked as such, so a broken one is never read.
    Args: origin: what the targets were made of; see has_targets. shared: what belongs to no row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, NDArray[Any]] = {}
    done = 0
    for shard in shards:
        length = len(next(iter(shard.values())))
        for name, values in shard.items():
            if name not in files:
                shape = (rows, *values.shape[1:])
                files[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", mode="w+", dtype=values.dtype, shape=shape
                )
            files[name][done : done + length] = values
        done += length
    assert done == rows, f"shards of {done} rows, wanted {rows}"
    for file in files.values():
        file.flush()  # type: ignore[attr-defined]
    for name, values in (shared or {}).items():
        np.save(folder / f"{name}.npy", values)
    told = {"origin": origin, "arrays": sorted(files), "shared": sorted(shared or {})}
    partial = folder / f"{_DONE}.partial"
    partial.write_text(json.dumps(told), encoding="utf-8")
    os.replace(partial, folder / _DONE)


def has_targets(folder: Path, origin: str) -> bool:
    """Whether the folder was written whole, and of these inputs.

    Raises: ValueError when it was written of others: going on would mix two runs.
    """
    if not (folder / _DONE).exists():
        return False
    found = json.loads((folder / _DONE).read_text(encoding="utf-8"))["origin"]
    if found != origin:
        raise ValueError(
            f"{folder} holds targets of other contributions or settings; use another folder for "
            "this run, or delete it"
        )
    return True


def read_targets(folder: Path, stream: NDArray[np.integer[Any]]) -> TargetStore:
    """Open what write_targets wrote; arrays stay on disk until a batch asks for their rows."""
    told = json.loads((folder / _DONE).read_text(encoding="utf-8"))
    arrays, shared = (
        {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in told[kind]}
        for kind in ("arrays", "shared")
    )
    return TargetStore(stream, arrays, shared)
