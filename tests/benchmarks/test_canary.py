import json
from pathlib import Path

import pytest

from benchmarks.canary import main
from participant import canaries


@pytest.mark.slow
def test_an_over_fitted_expert_is_stopped_and_a_clean_one_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One seed at the scale of the demo; `benchmarks/canary.py --seeds 20` gives the rates."""
    file = tmp_path / "planted-0" / canaries.FILE  # records of chance would give figures of chance
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"secret": "5a" * 32, "pairs": 49}), encoding="utf-8")
    assert main(["--seeds", "1", "--json", "--work", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["canary"] == {"tpr": 1, "fpr": 0}
    assert found["overfit"]["recall_tpr"] > 0.9 > found["clean"]["recall_tpr"]
