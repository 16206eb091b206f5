"""A pivot's folder: all of it passes the receiver's checks and is read by those who get it."""

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from fusion.models import load_model, save_model
from protos.spec import RoundSpec
from tests.coordinator.finished_pivot import TEXTS, finished_pivot, tiny_model
from trust.pivot_folder import check_contents


@pytest.fixture(scope="module")
def pivot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_pivot(tmp_path_factory.mktemp("pivot"))


def test_a_receiver_takes_every_file_of_it(pivot: Path) -> None:
    files = {path.name: path for path in pivot.iterdir()}
    check_contents(files)
    sums = dict(line.split("  ")[::-1] for line in (pivot / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == files.keys() - {"SHA256SUMS"}
    for name, digest in sums.items():
        assert hashlib.sha256(files[name].read_bytes()).hexdigest() == digest


def test_the_hub_reads_the_card_as_it_was_meant(pivot: Path) -> None:
    card = ModelCard.load(pivot / "README.md")
    evals = json.loads((pivot / "evals.json").read_text())
    assert (card.data.base_model, card.data.license) == ("pivot-1", "apache-2.0")
    assert card.data.model_name == "pivot-2"
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found["brain", "bpb"] == pytest.approx(evals["bpb"]["unified"]["brain"], abs=1e-6)
    assert found["Heart and lungs", "accuracy"] == pytest.approx(
        evals["accuracy"]["unified"]["Heart and lungs"], abs=1e-6
    )
    assert ("brain", "accuracy") not in found  # nobody asked about it
    for told in ("| pivot-1 | pivot-0 | rnd-1 |", "| pivot-2 | pivot-1 | rnd-2 |", "1,234 bytes"):
        assert told in card.text
    assert "--tasks cofuse --include_path ." in card.text


def test_the_rounds_spec_lies_beside_it_and_is_one(pivot: Path) -> None:
    spec = yaml.safe_load((pivot / "round.yaml").read_text())
    assert spec == json.loads((pivot / "lineage.json").read_text())["spec"]
    assert RoundSpec.model_validate(spec).pivot == "pivot-1"


@pytest.mark.parametrize(
    ("architecture", "kind"), [("llama", "AutoTokenizer"), ("qwen2", "PreTrainedTokenizerFast")]
)
def test_the_cards_own_lines_open_it_and_encode_as_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, kind: str
) -> None:
    """AutoTokenizer would split a qwen2 pivot's text by Qwen's rules, whatever its own are."""
    folder = finished_pivot(tmp_path, architecture)  # type: ignore[arg-type]
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(folder.parent)
    found: dict[str, object] = {}
    exec(code, found)
    assert f"{kind}.from_pretrained" in code
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    own = found["tokenizer"]
    assert [own(text)["input_ids"] for text in TEXTS] == [tokenizer(t)["input_ids"] for t in TEXTS]  # type: ignore[operator]
    assert isinstance(found["model"], type(AutoModelForCausalLM.from_pretrained(folder)))


def test_a_tokenizer_that_auto_tokenizer_cannot_open_costs_no_pivot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("unknown tokenizer")

    monkeypatch.setattr("coordinator.pivot_files.AutoTokenizer.from_pretrained", refuse)
    lineage = json.loads((finished_pivot(tmp_path) / "lineage.json").read_text())
    assert lineage["model"]["tokenizer"] == "PreTrainedTokenizerFast"


def test_the_page_about_pivots_names_every_file(pivot: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "pivot.md").read_text(encoding="utf-8")
    cells = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    named = set(re.findall(r"`([^`]+)`", cells))
    tasks = {path.name for path in pivot.glob("cofuse_*")}
    assert {path.name for path in pivot.iterdir()} - tasks <= named
    kinds = {re.sub(r"^cofuse_.*_(text|choice)", r"cofuse_DOMAIN_\1", name) for name in tasks}
    assert {name for name in kinds if name.endswith(".yaml")} <= named


def test_a_chat_template_stays_with_the_model_from_pivot_to_pivot(tmp_path: Path) -> None:
    """Servers refuse to chat without one."""
    model, tokenizer = load_model(tiny_model(tmp_path / "a"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    save_model(model, tokenizer, tmp_path / "b")
    save_model(*load_model(tmp_path / "b"), tmp_path / "c")
    text = (tmp_path / "c" / "chat_template.jinja").read_text()
    assert text == tokenizer.chat_template
    check_contents({path.name: path for path in (tmp_path / "c").iterdir()})
