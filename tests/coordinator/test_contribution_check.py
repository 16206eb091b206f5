"""Scores of pairs count when every number could be a model's, and of these pairs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.contribution_check import Wanted, check
from fusion.contribution import ContributionError
from fusion.pair_file import read_pairs
from fusion.pair_scores import PairScores, write_scores
from protos.chunks import sha256_of
from protos.spec import RoundSpec

ROWS = [{"prompt": f"Code {n} is", "chosen": " known.", "rejected": " new."} for n in range(3)]


@pytest.fixture
def wanted(tmp_path: Path) -> Wanted:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    spec = RoundSpec.model_validate(
        {
            "name": "x",
            "pivot": "pivot-0",
            "participants": ["a"],
            "kind": "pairs",
            "method": "preference",
            "pairs": f"sha256:{sha256_of(path)}",
            "training": {"steps": 1, "lr": 0.1},
        }
    )
    return Wanted(spec=spec, pivot_sha256="0" * 64, weights=tmp_path / "none", public_set=path)


def scores(wanted: Wanted, **change: Any) -> Path:
    assert wanted.public_set is not None
    path, tokens = wanted.public_set.with_name("scores"), np.full(3, 2)
    told = PairScores(np.full(3, -4.5), tokens, np.full(3, -6.25), tokens)
    write_scores(path, told, read_pairs(wanted.public_set).pairs, model_sha256="a" * 64)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    return path


def test_honest_scores_of_the_round_s_pairs_count(wanted: Wanted) -> None:
    check(scores(wanted), wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"pairs_sha256": "b" * 64}, "score the pairs of this round"),
        ({"chosen_logp": [-1.0, -1.0]}, "wanted 3 of each"),
        ({"chosen_logp": [-1.0, -1.0, float("nan")]}, "chosen_logp"),
        ({"rejected_logp": [-1.0, -1.0, float("-inf")]}, "rejected_logp"),
        ({"rejected_logp": [-1.0, -1.0, -1e9]}, "rejected of pair 2"),
        ({"chosen_tokens": [2, 2, 10**6]}, "chosen of pair 2"),
        ({"chosen_logp": [0.5, -1.0, -1.0]}, "chosen_logp.0"),
        ({"code": "import os"}, "code"),
    ],
)
def test_what_no_model_could_say_is_refused_with_the_place(
    wanted: Wanted, change: dict[str, Any], says: str
) -> None:
    path = scores(wanted, **change)
    with pytest.raises(ContributionError, match=says) as caught:
        check(path, wanted)
    assert (caught.value.code, str(path) in str(caught.value)) == ("malformed", False)
