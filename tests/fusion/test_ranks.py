"""A whole fusion on two ranks is the one of one. This file is also what torchrun starts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fp8.distributed import full_state_dict, join
from fusion.unified import fuse
from tests.fusion.test_unified import PROMPTS, SETTINGS, both, pivot, tokenizer

ROOT = Path(__file__).parents[2]


def fused(folder: Path, fp8: bool) -> dict[str, object]:
    """Losses, and a fingerprint of the weights that the run left."""
    net = pivot()
    settings = replace(SETTINGS, batch_size=4, seq_len=32, fp8=fp8)
    result = fuse(net, tokenizer(300), PROMPTS, both(), settings, checkpoint_dir=folder)
    weights = full_state_dict(net)
    total = {n: float(w.double().square().sum()) for n, w in weights.items()}
    return {"losses": result.train.losses, "weights": total}


@pytest.mark.slow
@pytest.mark.parametrize("fp8", [False, True])
def test_two_ranks_fuse_what_one_fuses(tmp_path: Path, fp8: bool) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", __file__, str(tmp_path / "two"), str(int(fp8))]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "two" / "found.json").read_text())
    alone = fused(tmp_path / "one", fp8)
    tolerance = 2e-2 if fp8 else 1e-5  # in FP8 the tiles of a rank's tokens are not the batch's
    assert found["losses"] == pytest.approx(alone["losses"], rel=tolerance)
    assert found["weights"] == pytest.approx(alone["weights"], rel=tolerance)


def test_ranks_without_a_folder_that_all_see_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8.distributed import Ranks
    from fusion import unified

    monkeypatch.setattr(unified, "join", lambda: Ranks(0, 2))
    with pytest.raises(ValueError, match="give checkpoint_dir, a folder that all see"):
        fuse(pivot(), tokenizer(300), PROMPTS, both(), SETTINGS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place = Path(sys.argv[1])
    if join().first:
        place.mkdir(parents=True)
    told = fused(place, bool(int(sys.argv[2])))
    if join().first:
        (place / "found.json").write_text(json.dumps(told))
