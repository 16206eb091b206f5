"""`cofuse pivot complete` as it is typed."""

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cofuse.cli import app
from fusion.models import ModelSpec, build_model, save_model, train_tokenizer
from protos.public_sets import read_prompt_set, read_prompts, write_prompts
from tests.cofuse.envelope import told

DOCUMENTS = [f"Code {n} is a caf\u00e9 of the heart." for n in range(12)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(DOCUMENTS, 300)
    spec = ModelSpec(
        architecture="llama",
        hidden_size=32,
        layers=1,
        heads=2,
        vocab_size=len(tokenizer),
        context=32,
    )
    save_model(build_model(spec, 0), tokenizer, tmp_path / "pivot")
    write_prompts(tmp_path / "prompts.jsonl", DOCUMENTS)
    return tmp_path


def run(folder: Path, *words: str, status: int = 0, model: str = "pivot") -> Result:
    files = [str(folder / model), str(folder / "prompts.jsonl")]
    done = CliRunner().invoke(app, ["pivot", "complete", *files, *words])
    assert done.exit_code == status, done.output
    return done


def test_a_pivots_completions_are_a_prompt_set_that_the_seed_names(folder: Path) -> None:
    one, two, other = (folder / f"{name}.jsonl" for name in "abc")
    done = run(folder, "--out", str(one), "--count", "15", "--seed", "4", "--json")
    said = told(done.stdout)
    texts = read_prompts(one)
    assert said == {
        "ok": True,
        "prompts": str(one),
        "documents": 15,
        "bytes": sum(len(text.encode()) for text in texts),
    }
    assert len(set(texts)) == 15
    plain = run(folder, "--out", str(two), "--count", "15", "--seed", "4", "--batch-size", "3")
    assert plain.stdout.strip().splitlines()[-1] == str(two)
    assert two.read_bytes() == one.read_bytes()
    run(folder, "--out", str(other), "--count", "15", "--seed", "5")
    assert other.read_bytes() != one.read_bytes()


def test_what_the_pivot_wrote_is_marked_and_the_public_text_is_not(folder: Path) -> None:
    out = folder / "both.jsonl"
    run(folder, "--out", str(out), "--count", "5", "--with-public")
    found = read_prompt_set(out)
    assert [prompt.text for prompt in found if not prompt.written] == DOCUMENTS
    assert [prompt.written for prompt in found] == [False] * len(DOCUMENTS) + [True] * 5


@pytest.mark.parametrize(
    ("words", "model", "says"),
    [
        (["--out", "prompts.jsonl"], "pivot", "exists; give another name"),
        (["--out", "no/where.jsonl"], "pivot", "make it first"),
        (["--out", "o.jsonl"], "nothing", "no tokenizer.json"),
        (["--out", "o.jsonl", "--opening", "0.9", "0.1"], "pivot", "share_of_document"),
        (["--out", "o.jsonl", "--temperature", "-1"], "pivot", "temperature"),
    ],
)
def test_bad_input_is_refused_with_a_remedy_and_nothing_is_written(
    folder: Path, words: list[str], model: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    done = run(folder, *words, "--count", "2", "--json", status=2, model=model)
    said = told(done.stdout)
    assert said["ok"] is False
    assert says in said["error"]
    assert "error: " in done.stderr
    assert sorted(folder.rglob("*")) == before
