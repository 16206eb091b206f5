from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion.target_store import has_targets, read_targets, write_targets


def arrays(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "probs": rng.random((rows, 3)).astype(np.float32),
        "weight": rng.random(rows).astype(np.float32),
        "ids": rng.integers(0, 9, (rows, 3)).astype(np.int32),
    }


@pytest.mark.parametrize("cuts", [[10], [1, 9], [3, 3, 4]])
def test_shards_read_back_as_one_by_the_rows_of_a_batch(tmp_path: Path, cuts: list[int]) -> None:
    whole, edges = arrays(10), np.concatenate([[0], np.cumsum(cuts)])
    shards = [{name: values[a:b] for name, values in whole.items()} for a, b in pairwise(edges)]
    write_targets(tmp_path / "t", 10, iter(shards), "origin")
    stream = np.arange(11, dtype=np.int32) + 100
    batch = read_targets(tmp_path / "t", stream).batch(torch.tensor([[0, 1, 2], [7, 8, 9]]))
    assert batch.inputs.tolist() == [[100, 101, 102], [107, 108, 109]]
    assert batch.labels.tolist() == [[101, 102, 103], [108, 109, 110]]
    for name, values in whole.items():
        assert np.array_equal(batch.targets[name].numpy(), values[[[0, 1, 2], [7, 8, 9]]])


def test_a_folder_that_was_not_written_whole_is_not_read(tmp_path: Path) -> None:
    def broken() -> object:
        yield arrays(4)
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        write_targets(tmp_path, 8, broken(), "origin")  # type: ignore[arg-type]
    assert not has_targets(tmp_path, "origin")
    write_targets(tmp_path, 4, iter([arrays(4)]), "origin")
    assert has_targets(tmp_path, "origin")


def test_targets_of_another_run_are_refused(tmp_path: Path) -> None:
    write_targets(tmp_path, 4, iter([arrays(4)]), "one")
    with pytest.raises(ValueError, match="other contributions or settings"):
        has_targets(tmp_path, "two")
