"""`cofuse fuse` as it is typed: what it prints, what it writes, and how it refuses."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner, Result

from cofuse import local_check
from cofuse.cli import app
from fusion.models import load_model
from tests.cofuse.envelope import told
from tests.cofuse.local_models import MERGE, SPEC, lay_out, write_spec


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("models"))


@pytest.fixture
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that a test may spoil; the current folder."""
    shutil.copytree(models, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def _run(*words: object, status: int = 0) -> Result:
    done = CliRunner().invoke(app, ["fuse", *map(str, words)])
    assert done.exit_code == status, done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done


def _json(done: Result) -> dict[str, Any]:
    content: dict[str, Any] = told(done.stdout)
    return content


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_dry_run_says_what_it_would_cost_and_writes_nothing(folder: Path) -> None:
    spec = write_spec(folder, {**SPEC, "training": {**SPEC["training"], "steps": 40}})
    before = _everything(folder)
    done = _run(spec, "--dry-run", "--out", folder / "out", "--json")
    assert _everything(folder) == before
    facts = _json(done)["dry_run"]
    assert facts["pivot"]["architecture"] == "LlamaForCausalLM"
    assert facts["pivot"]["parameters"] == load_model(folder / "pivot")[0].num_parameters()
    heart, nerve = facts["sources"]
    assert (heart["name"], nerve["name"]) == ("heart", "nerve")
    assert heart["architecture"] == "Qwen2ForCausalLM"
    for row in (heart, nerve):
        assert 0 < row["one_to_one"] <= row["common"] < 1
        assert row["contribution_bytes"] > row["tokens"] * 4
    assert facts["prompts"]["documents"] == 24
    assert facts["training"]["epochs"] == pytest.approx(
        40 * 2 * 16 / facts["pivot"]["tokens"], abs=1e-3
    )
    words = _run(spec, "--dry-run").stdout
    assert "nothing was written" in words
    assert "24 documents" in words
    assert "Qwen2ForCausalLM" in words


def test_the_pivots_own_tokenizer_agrees_everywhere(folder: Path) -> None:
    spec = write_spec(folder, {**SPEC, "sources": {"same": "pivot-1"}})
    row = _json(_run(spec, "--dry-run", "--json"))["dry_run"]["sources"][0]
    assert (row["common"], row["one_to_one"]) == (1.0, 1.0)


def _spoil(name: str, change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: change(folder / name)


def _config(**values: Any) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def _nothing(_folder: Path) -> None:
    pass


REFUSED: list[tuple[str, dict[str, Any], Callable[[Path], object], str]] = [
    ("no pivot", {"pivot": "nowhere"}, _nothing, "pivot: .*found no config.json"),
    ("no source", {"sources": {"a": "nowhere"}}, _nothing, "sources.a: .*there is nothing"),
    ("a text", {"sources": {"a": "prompts.jsonl"}}, _nothing, "is no safetensors file"),
    (
        "bare weights",
        {"sources": {"a": "pivot/model.safetensors"}},
        _nothing,
        "found safetensors of format 'pt'.*give the directory",
    ),
    ("no prompts", {"prompts": "nowhere"}, _nothing, "prompts: there is no file"),
    ("no evals", {"evals": "nowhere"}, _nothing, "evals: there is no file"),
    ("prompts empty", {}, _spoil("prompts.jsonl", lambda p: p.write_text("")), "found no document"),
    (
        "prompts broken",
        {},
        _spoil("prompts.jsonl", lambda p: p.write_text('{"text": "a"}\n{"txt": 3}\n')),
        "prompts.jsonl:2: found",
    ),
    ("evals broken", {}, _spoil("evals.json", lambda p: p.write_text("{}")), "evals.json: domains"),
    (
        "evals with a wrong answer",
        {},
        _spoil(
            "evals.json",
            lambda p: p.write_text(p.read_text().replace('"answer": 0', '"answer": 2')),
        ),
        "has 2 options and answer 2; answers count from 0",
    ),
    ("long", {"training": {**SPEC["training"], "seq_len": 65}}, _nothing, "sees 64 tokens at once"),
    (
        "longer",
        {"training": {**SPEC["training"], "seq_len": 5000}},
        _nothing,
        "whole prompt set has only",
    ),
    ("top_k", {"top_k": 300}, _nothing, "top_k: found 300, but sources.nerve has only 280"),
    (
        "no tokenizer",
        {},
        _spoil("heart/tokenizer.json", Path.unlink),
        "sources.heart: .*found no tokenizer.json",
    ),
    (
        "another's tokenizer",
        {},
        _spoil("nerve/config.json", _config(vocab_size=258)),
        "sources.nerve: .*does not give back the text",
    ),
    (
        "quantized",
        {},
        _spoil("heart/config.json", _config(quantization_config={"quant_method": "fp8"})),
        "holds fp8 weights.*cofuse fp8 export --bf16",
    ),
    ("broken config", {}, _spoil("heart/config.json", lambda p: p.write_text("{")), "is not JSON"),
    (
        "broken weights",
        {},
        _spoil("heart/model.safetensors", lambda p: p.write_bytes(b"\x10" * 99)),
        "is no safetensors",
    ),
    ("no weights", {}, _spoil("heart/model.safetensors", Path.unlink), "found neither"),
    (
        "unlike models",
        {**MERGE, "sources": {"a": "pivot-1", "b": "heart"}},
        _nothing,
        "the tokenizers differ.* of b has .*fuse by logits",
    ),
]


@pytest.mark.parametrize(
    ("change", "spoil", "says"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_bad_input_is_refused_with_what_was_found_and_what_to_do(
    folder: Path, change: dict[str, Any], spoil: Callable[[Path], object], says: str
) -> None:
    values = change if "method" in change else {**SPEC, **change}
    spoil(folder)
    spec = write_spec(folder, values)
    before = _everything(folder)
    done = _run(spec, "--out", folder / "out", "--json", status=2)
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.output
    refused = _json(done)
    assert refused["ok"] is False
    assert re.search(says, refused["error"]), refused["error"]
    assert _everything(folder) == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["fuse.yaml"], "--out is missing"),
        (["nowhere.yaml", "-o", "out"], "nowhere.yaml: cannot be read"),
        (["pivot", "-o", "out"], "pivot: cannot be read"),
        (["fuse.yaml", "-o", "pivot"], "is or holds .*pivot, which the fusion reads"),
        (["fuse.yaml", "-o", "pivot", "--force"], "is or holds .*pivot, which the fusion reads"),
        (["fuse.yaml", "-o", ".", "--force"], "is or holds"),
        (["fuse.yaml", "-o", "heart-1"], "heart-1 exists; give another name, or --force"),
        (["fuse.yaml", "-o", "heart-1", "--force"], "is no pivot directory"),
        (["fuse.yaml", "-o", "prompts.txt"], "prompts.txt is a file"),
        (["fuse.yaml", "-o", "out", "--work", "prompts.txt"], "prompts.txt is a file"),
        (["fuse.yaml", "-o", "out", "--work", "out/work"], "lies in --out"),
    ],
)
def test_what_would_destroy_something_is_refused_before_the_work(
    folder: Path, words: list[str], says: str
) -> None:
    write_spec(folder, SPEC)
    (folder / "heart-1").mkdir()
    (folder / "heart-1" / "precious").write_text("x")
    (folder / "prompts.txt").write_text("x")
    before = _everything(folder)
    done = _run(*words, status=2)
    assert re.search(says, done.stderr), done.stderr
    assert done.stdout == ""
    assert _everything(folder) == before


def test_an_unknown_key_is_refused_with_its_line(folder: Path) -> None:
    spec = write_spec(folder, {**SPEC, "loss_weight": 0.5})
    line = len(spec.read_text().splitlines())
    assert f"fuse.yaml:{line}: unknown key 'loss_weight'" in _run(spec, status=2).stderr


def test_debug_shows_where_an_error_came_from(folder: Path) -> None:
    spec = write_spec(folder, {**SPEC, "pivot": "nowhere"})
    done = CliRunner().invoke(app, ["fuse", str(spec), "--dry-run", "--debug"])
    assert isinstance(done.exception, local_check.LocalInputError)


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from cofuse.cli import app\n"
        "try: app(['fuse', '--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip().endswith("[]")
    assert "--dry-run" in done.stdout


@pytest.mark.slow
def test_a_fusion_prints_tables_and_leaves_a_pivot_that_force_replaces(folder: Path) -> None:
    spec = write_spec(folder, {**SPEC, "controls": ["sft"]})
    first = _run(spec, "--out", "out", "--json")
    assert len(first.stdout.splitlines()) == 1
    found = _json(first)
    assert found["pivot"] == "out"
    assert list(found["evals"]["bpb"])[-2:] == ["sft", "unified"]
    assert "log-probabilities" in first.stderr
    (folder / "out" / "notes.txt").write_text("x")
    _run(spec, "--out", "out", status=2)
    again = _run(spec, "--out", "out", "--force")
    assert not (folder / "out" / "notes.txt").exists()
    assert {p.name for p in folder.iterdir() if p.name.startswith("out")} == {"out", "out.work"}
    assert "expert:heart" in again.stdout
    assert again.stdout.splitlines()[-1] == "pivot: out"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_fusion_goes_on_and_gives_the_same_bits(
    folder: Path, how: signal.Signals
) -> None:
    values = {**SPEC, "training": {**SPEC["training"], "steps": 400}}
    spec = write_spec(folder, values)
    command = [sys.executable, "-m", "cofuse.cli", "fuse", str(spec), "--out", "out"]
    root = Path(__file__).parents[3]
    process = subprocess.Popen(
        command, cwd=folder, env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.PIPE
    )
    checkpoints = folder / "out.work"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("job-*/runs/unified/checkpoint/*")):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(how)
    _, words = process.communicate(timeout=60)
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    if how != signal.SIGKILL:
        assert b"Go on with the same command" in words
        assert b"Traceback" not in words
    assert not (folder / "out").exists()
    _wait_until_nothing_runs(checkpoints)
    _run(spec, "--out", "out")
    _run(spec, "--out", "fresh")
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("out", "fresh")]
    assert weights[0] == weights[1]


def _wait_until_nothing_runs(work: Path) -> None:
    """The kernel ends a killed parent's children; that takes a moment."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if _readable(p)]
        if not any(str(work).encode() in line for line in lines):
            return
        time.sleep(0.1)
    raise AssertionError(f"a child still works in {work}")


def _readable(path: Path) -> bool:
    try:
        path.read_bytes()
    except OSError:
        return False
    return True


@pytest.mark.slow
def test_a_source_that_diverged_is_a_failure_with_its_reason(folder: Path) -> None:
    from safetensors.numpy import load_file

    path = folder / "heart" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][:] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    spec = write_spec(folder, SPEC)
    done = _run(spec, "--out", "out", status=1)
    assert "NaN" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "out").exists()
