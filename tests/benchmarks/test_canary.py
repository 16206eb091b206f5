import json

import pytest

from benchmarks.canary import main


@pytest.mark.slow
def test_an_over_fitted_expert_is_stopped_and_a_clean_one_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One seed at the scale of the demo; `benchmarks/canary.py --seeds 20` gives the rates."""
    assert main(["--seeds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["canary"] == {"tpr": 1, "fpr": 0}
    assert found["overfit"]["recall_tpr"] > 0.9 > found["clean"]["recall_tpr"]
    assert found["clean"]["release_auc"] < 0.6
