"""`cofuse fp8` as it is typed: what it prints, what it writes, and how it refuses."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from cofuse.cli import app
from cofuse.commands.fp8 import _common_prefix
from fp8.quantize import dequantize, quantize
from fp8.recipe import BlockScaling
from fusion.models import ModelSpec, build_model, save_model, train_tokenizer
from tests.cofuse.envelope import told

TEXT = "The patient was seen in the clinic and was given a new medicine for the heart. "
IDS = torch.arange(40).reshape(2, 20)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([TEXT] * 3, 300)


@pytest.fixture
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    spec = ModelSpec(
        architecture="llama",
        hidden_size=128,
        layers=2,
        heads=2,
        vocab_size=len(tokenizer),
        intermediate_size=256,
    )
    save_model(build_model(spec, 0), tokenizer, tmp_path / "model")
    (tmp_path / "notes.txt").write_text(TEXT * 50)
    return tmp_path


def _run(*words: object, status: int = 0) -> Result:
    done = CliRunner().invoke(app, ["fp8", *map(str, words)])
    assert done.exit_code == status, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done


def _json(done: Result) -> dict[str, Any]:
    content: dict[str, Any] = told(done.stdout)
    return content


def _numbers(done: Result) -> list[float]:
    return [float(x) for x in re.findall(r"(?:weight|input|grad_output) +([\d.]+)", done.stdout)]


def test_inspect_lists_the_worst_first_and_sums_up(folder: Path) -> None:
    done = _run("inspect", folder / "model", "--text", folder / "notes.txt", "--rows", "5")
    numbers = _numbers(done)
    assert len(numbers) == 5
    assert numbers == sorted(numbers)
    assert "5 of 42 tensors" in done.stdout
    for role in ("input", "weight", "grad_output"):
        assert f"{role}: 14 layers" in done.stdout
    assert "no warnings" in done.stdout


def test_inspect_without_text_looks_at_weights_and_says_so(folder: Path) -> None:
    done = _run("inspect", folder / "model", "--rows", "0")
    assert len(_numbers(done)) == 14
    assert "note: weights only" in done.stdout
    assert "grad_output" not in done.stdout


@pytest.mark.parametrize("recipe", ["block", "rowwise", "current", "delayed", "mxfp8", "nvfp4"])
def test_inspect_knows_every_recipe(folder: Path, recipe: str) -> None:
    words = ("inspect", folder / "model", "--recipe", recipe, "--text", folder / "notes.txt")
    found = _json(_run(*words, "--json"))
    assert found["ok"]
    assert found["recipe"] == recipe
    assert found["tokens"] > 100
    roles = {row["role"] for row in found["rows"]}
    assert roles == {"input", "weight", "grad_output"}


def test_json_is_all_there_is_on_stdout(folder: Path) -> None:
    done = _run("inspect", folder / "model", "--json", "--plot", folder / "a.png")
    assert len(done.stdout.splitlines()) == 1
    found = _json(done)
    assert found["plot"] == str(folder / "a.png")
    assert len(found["rows"]) == 14
    assert "tensors, the worst first" in done.stderr


def test_a_plot_is_written_where_it_says(folder: Path) -> None:
    done = _run("inspect", folder / "model", "--plot", folder / "a.png")
    assert f"plot: {folder / 'a.png'}" in done.stdout
    assert (folder / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_warning_is_printed_with_its_remedy(folder: Path) -> None:
    weights = load_file(folder / "model" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    weights[name][:, 1:] *= 1e-8
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    done = _run("inspect", folder / "model", "--recipe", "current")
    text = " ".join(done.stdout.split())
    assert "warning: weight of model.layers.1.mlp.down_proj loses 99.6% of its" in text
    assert "use BlockScaling()" in text


def test_nan_is_a_warning_and_no_crash(folder: Path) -> None:
    weights = load_file(folder / "model" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model" / "model.safetensors", metadata={"format": "pt"})
    words = ("inspect", folder / "model", "--text", folder / "notes.txt", "--plot")
    done = _run(*words, folder / "a.png")
    assert "holds NaN or infinity" in done.stdout
    refused = _run("export", folder / "model", folder / "out", status=2)
    assert "model.layers.0.mlp.up_proj" in refused.stderr
    assert not (folder / "out").exists()


def test_export_writes_fp8_that_inspect_and_transformers_read(folder: Path) -> None:
    done = _run("export", folder / "model", folder / "out")
    assert done.stdout.strip() == str(folder / "out")
    assert "14 layers in FP8" in done.stderr
    assert "not FP8: model.embed_tokens and 1 more" in done.stderr
    assert (folder / "out" / "tokenizer.json").read_bytes() == (
        folder / "model" / "tokenizer.json"
    ).read_bytes()
    config = json.loads((folder / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "fp8"
    found = _json(
        _run("inspect", folder / "out", "--json", "--text", folder / "notes.txt", "--tokens", "64")
    )
    # Weights that were quantised lose nothing when they are quantised again.
    assert all(row["sqnr_db"] is None for row in found["rows"] if row["role"] == "weight")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    spec = BlockScaling().weight
    for name, weight in load_file(folder / "model" / "model.safetensors").items():
        wanted = dequantize(quantize(weight, spec)) if "proj" in name else weight
        assert torch.equal(loaded[name], wanted.bfloat16())


def test_export_goes_to_bf16_from_either_side(folder: Path) -> None:
    _run("export", folder / "model", folder / "fp8")
    _run("export", folder / "fp8", folder / "back", "--bf16")
    _run("export", folder / "model", folder / "bf16", "--bf16")
    back, fp8, bf16 = (
        AutoModelForCausalLM.from_pretrained(folder / name).eval()(IDS).logits
        for name in ("back", "fp8", "bf16")
    )
    assert torch.equal(back, fp8)
    assert not torch.equal(back, bf16)
    assert torch.allclose(back.float(), bf16.float(), atol=0.5)


def test_export_says_what_it_wrote_in_json(folder: Path) -> None:
    done = _run("export", folder / "model", folder / "out", "--json")
    found = _json(done)
    assert len(done.stdout.splitlines()) == 1
    assert found["path"] == str(folder / "out")
    assert len(found["fp8"]) == 14
    assert set(found["kept"]) == {"model.embed_tokens", "lm_head"}
    files = sum(t.nbytes for t in load_file(folder / "out" / "model.safetensors").values())
    assert found["size_bytes"] == files


def test_backends_name_one_for_every_recipe_and_reasons_against_the_others() -> None:
    done = _run("backends", "--device", "cpu", "--json")
    found = _json(done)
    assert found["device"] == "cpu"
    assert set(found["recipes"]) == {"block", "rowwise", "current", "delayed", "mxfp8", "nvfp4"}
    for recipe in found["recipes"].values():
        assert recipe["backend"] == "emulated"
        assert recipe["refused"]["scaled_mm"]
        assert "emulated" not in recipe["refused"]
    assert "emulated" in _run("backends", "--device", "cpu").stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["inspect", "nowhere"], "found no config.json, wanted a Hugging Face model directory"),
        (["inspect", "notes.txt"], "found no config.json"),
        (["inspect", "model", "--recipe", "blok"], "did you mean block?"),
        (["inspect", "model", "--recipe", "xyz"], "block, rowwise, current"),
        (["inspect", "model", "--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["inspect", "model", "--text", "empty.txt"], "empty.txt is empty"),
        (["inspect", "model", "--text", "binary.txt"], "cannot be read as UTF-8"),
        (["inspect", "model", "--text", "one.txt"], "gives 1 tokens"),
        (["inspect", "mute", "--text", "notes.txt"], "found no tokenizer.json"),
        (["inspect", "model", "--plot", "no/such/a.png"], "there is no folder no/such"),
        (["inspect", "model", "--plot", "a.xls"], "must end in .png, .svg or .pdf"),
        (["inspect", "model", "--plot", "folder.png"], "is a folder"),
        (["inspect", "broken"], "cannot be loaded"),
        (["inspect", "partial"], "lacks 1 tensors, the first is model.norm.weight"),
        (["inspect", "scaleless"], "weight_scale_inv is missing"),
        (["export", "model", "model"], "model exists; give another name"),
        (["export", "nowhere", "out"], "found no config.json"),
        (["backends", "--device", "abacus"], "'abacus' is no device"),
    ],
)
def test_bad_input_is_refused_with_what_was_found_and_what_to_do(
    folder: Path, words: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    _make_bad_things(folder)
    for more in ([], ["--json"]):
        done = _run(*words, *more, status=2)
        assert says in done.stderr
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.output
        if more:
            assert _json(done)["ok"] is False
            assert says in _json(done)["error"]
        else:
            assert done.stdout == ""
    assert not (folder / "out").exists()


def _make_bad_things(folder: Path) -> None:
    (folder / "empty.txt").write_text(" \n")
    (folder / "one.txt").write_text("T")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    (folder / "folder.png").mkdir()
    for name in ("mute", "broken", "partial"):
        (folder / name).mkdir()
        for file in (folder / "model").iterdir():
            if name != "mute" or not file.name.startswith("tokenizer"):
                (folder / name / file.name).write_bytes(file.read_bytes())
    (folder / "broken" / "model.safetensors").write_bytes(b"\x10" * 100)
    weights = load_file(folder / "partial" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "partial" / "model.safetensors", metadata={"format": "pt"})
    (folder / "scaleless").mkdir()
    config = json.loads((folder / "model" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "scaleless" / "config.json").write_text(json.dumps(config))
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(
        {name: torch.zeros(8, 8, dtype=torch.float8_e4m3fn)},
        folder / "scaleless" / "model.safetensors",
    )


def test_a_missing_gpu_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "finds no CUDA device" in _run("backends", "--device", "cuda", status=2).stderr


@pytest.mark.parametrize("words", [["--help"], ["fp8", "--help"], ["fp8", "inspect", "--help"]])
def test_help_loads_no_torch(words: list[str]) -> None:
    code = (
        "import sys; from cofuse.cli import app\n"
        f"try: app({words!r})\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip().endswith("[]")
    assert "fp8" in done.stdout or "recipe" in done.stdout


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["a.b.0.q", "a.b.0.k", "a.b.1.q"], "a.b."),
        (["a.b.0.q", "a.b.01.q"], "a.b."),
        (["lm_head"], ""),
        (["x", "y"], ""),
        (["m.0", "m.10"], "m."),
        (["m.layer", "m.layer.sub"], "m."),
    ],
)
def test_names_are_shortened_at_dots_alone(names: list[str], prefix: str) -> None:
    assert _common_prefix(names) == prefix
    assert all(name.removeprefix(prefix) for name in names)
