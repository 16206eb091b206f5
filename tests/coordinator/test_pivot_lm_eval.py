"""Others open a pivot and measure it again with their own tools, and find what we say."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from fusion.models import Architecture
from tests.coordinator.finished_pivot import finished_pivot
from tests.own_python import python_with

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
_OPEN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("Code I2.9 is", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=8)[0]))
ours = {"cofuse", "coordinator", "fusion", "fp8", "trust", "protos"} & {*sys.modules}
assert not ours, ours
"""


@pytest.fixture(scope="module")
def lm_eval(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has lm-eval, and torch and transformers from here."""
    return python_with(tmp_path_factory.mktemp("lm-eval"), "lm-eval>=0.4.9,<0.5")


def test_transformers_alone_opens_it(tmp_path: Path) -> None:
    pivot = finished_pivot(tmp_path)
    said = _run([sys.executable, "-I", "-c", _OPEN, str(pivot)], tmp_path)
    assert "Code I2.9 is" in said


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_lm_eval_finds_our_figures_again(
    tmp_path: Path, lm_eval: Path, architecture: Architecture
) -> None:
    """By the card's own line, to the last digits that two ways of batching leave alike."""
    pivot = finished_pivot(tmp_path, architecture)
    card = (pivot / "README.md").read_text()
    (line,) = (row for row in card.splitlines() if "lm-eval run" in row)
    words = line.split("lm-eval ")[1].split()
    out = ["--device", "cpu", "--output_path", str(tmp_path / "out")]
    _run([str(lm_eval), "-m", "lm_eval", *words, *out], pivot)
    (file,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    wanted = json.loads((pivot / "lm_eval_results.json").read_text())["results"]
    assert found.keys() == wanted.keys()
    assert len(wanted) == 3
    for task, row in wanted.items():
        for key, value in row.items():
            if isinstance(value, float):
                assert found[task][key] == pytest.approx(value, rel=1e-4), (task, key)


def _run(words: Sequence[str], folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | OFFLINE
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
