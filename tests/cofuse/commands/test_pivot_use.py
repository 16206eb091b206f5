"""What one does with a pivot's folder, as it is typed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from cofuse.cli import app
from cofuse.pivot_chat import prompt_ids
from cofuse.pivot_serving import transformers_server
from tests.coordinator.finished_pivot import finished_pivot

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


@pytest.fixture(scope="module")
def pivot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_pivot(tmp_path_factory.mktemp("pivot"))


def run(*words: str, status: int = 0, typed: str = "") -> Result:
    done = CliRunner().invoke(app, ["pivot", *words], input=typed)
    assert done.exit_code == status, done.output
    return done


def test_the_card_is_printed_as_it_is(pivot: Path) -> None:
    assert run("card", str(pivot)).stdout == (pivot / "README.md").read_text()
    run("card", str(pivot.parent / "model"), status=2)


def test_a_pivot_answers_one_question_alike_however_it_is_asked(pivot: Path) -> None:
    words = ("chat", str(pivot), "--ask", "Code I2.9 is", "--max-new-tokens", "5")
    said = json.loads(run(*words, "--json").stdout)["data"]
    assert not said["chat_template"]
    assert said["answer"]
    assert run(*words).stdout.strip() == said["answer"].strip()
    drawn = [
        json.loads(run(*words, "--temperature", "2", "--seed", seed, "--json").stdout)["data"][
            "answer"
        ]
        for seed in ("1", "1", "2")
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_several_questions_are_answered_as_if_each_were_alone(pivot: Path) -> None:
    how = ("--max-new-tokens", "5", "--temperature", "1", "--json")
    asks = ("Code I2.9 is", "Code I3")
    alone = [json.loads(run("chat", str(pivot), "--ask", a, *how).stdout)["data"] for a in asks]
    words = [word for ask in asks for word in ("--ask", ask)]
    both = json.loads(run("chat", str(pivot), *words, *how).stdout)["data"]
    assert both["answers"] == [one["answers"][0] for one in alone]
    assert [one["asked"] for one in both["answers"]] == list(asks)


def test_lines_are_answered_until_there_are_no_more(pivot: Path) -> None:
    done = run("chat", str(pivot), "--max-new-tokens", "3", typed="Code I2\n\nis\n")
    assert len(done.stdout.strip().splitlines()) == 2
    assert "no chat template" in done.stderr


def test_a_conversation_is_told_by_the_template_and_a_lone_line_begins_a_document(
    pivot: Path,
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(pivot)
    said = [
        {"role": "user", "content": "Code I2"},
        {"role": "assistant", "content": "is"},
        {"role": "user", "content": "left"},
    ]
    assert prompt_ids(tokenizer, said) == [0, *tokenizer("left")["input_ids"]]
    tokenizer.chat_template = TEMPLATE
    text = "[user] Code I2\n[assistant] is\n[user] left\n[assistant] "
    assert prompt_ids(tokenizer, said) == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["chat", "{pivot}", "--json"], "--ask"),
        (["chat", "{pivot}/nowhere", "--ask", "x"], "no such folder"),
        (["chat", "{pivot}", "--ask", "Code " * 200], "no room"),
        (["export", "{pivot}", "--out", "{pivot}/../x.gguf"], "--gguf"),
        (["export", "{pivot}", "--gguf", "--out", "{pivot}/README.md"], "another --out"),
        (["serve", "{pivot}/nowhere"], "no config.json"),
        (["upload", "{pivot}/../model", "a/b"], "SHA256SUMS"),
    ],
)
def test_misuse_is_refused_with_what_helps(pivot: Path, words: list[str], says: str) -> None:
    done = run(*(word.format(pivot=pivot) for word in words), status=2)
    assert says in done.stderr


def test_serving_names_both_servers_and_runs_offline(pivot: Path, tmp_path: Path) -> None:
    lines = run("serve", str(pivot), "--port", "8123", "--print").stdout.splitlines()
    assert lines == [
        f"transformers serve {pivot} --host localhost --port 8123",
        f"vllm serve {pivot} --served-model-name pivot-2",
    ]
    server = transformers_server(pivot, "localhost", 8123, tmp_path)
    assert server.program[0] == sys.executable
    assert list(server.program[3:]) == list(server.command[1:])
    assert server.environment["HF_HUB_OFFLINE"] == "1"


def test_a_pivot_that_servers_would_read_otherwise_is_not_served(tmp_path: Path) -> None:
    folder = finished_pivot(tmp_path, "qwen2")
    assert "split texts otherwise" in run("serve", str(folder), "--print", status=1).stderr
    assert "transformers serve" not in (folder / "README.md").read_text()


def test_a_refused_export_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    folder = finished_pivot(tmp_path, "gpt_neox")
    done = run("export", str(folder), "--gguf", "--out", str(tmp_path / "x"), "--json", status=1)
    assert "gpt_neox" in json.loads(done.stdout)["error"]["message"]
    assert not list(tmp_path.glob("x*"))


class Hub:
    """Notes what would have been sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        for name in ("create_repo", "upload_folder"):
            monkeypatch.setattr(HfApi, name, self._note(name))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("cofuse.pivot_upload.get_token", lambda: None)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def _note(self, name: str) -> Any:
        def note(api: HfApi, *words: str, **how: Any) -> str:
            self.calls.append((name, {"token": api.token, "words": words, **how}))
            return "https://hub/a/b"

        return note


def test_a_pivot_goes_to_the_hub_whole_private_and_with_a_token_only(
    pivot: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = Hub(monkeypatch)
    assert "no token" in run("upload", str(pivot), "a/b", status=1).stderr
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    assert "OWNER/NAME" in run("upload", str(pivot), "a/b/c", status=1).stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in run("upload", str(pivot), "a/b", status=1).stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert hub.calls == []
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  README.md\n")
    (tmp_path / "README.md").write_text("changed")
    assert "not the file" in run("upload", str(tmp_path), "a/b", status=1).stderr
    assert hub.calls == []
    assert run("upload", str(pivot), "a/b").stdout.strip() == "https://hub/a/b"
    (made, repo), (sent, files) = hub.calls
    assert (made, repo["private"], repo["token"]) == ("create_repo", True, "hf_x")
    assert (sent, files["folder_path"]) == ("upload_folder", pivot)
    assert {*files["allow_patterns"]} == {path.name for path in pivot.iterdir()}
