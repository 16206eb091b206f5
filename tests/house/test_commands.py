"""Every `cofuse ...` that a page shows is a command of ours, with options that it has."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from cofuse.cli import app

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
)
ROOT_COMMAND: Final = get_command(app)
PAST: Final = frozenset({"CHANGELOG.md"})
"""It may name what is no more."""


def shown(page: Path) -> Iterator[list[str]]:
    """The words of every `cofuse ...`, in fenced blocks and in code spans, up to what ends it."""
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    spans = re.findall(r"`(cofuse [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    for line in [*lines, *(span.replace("\n", " ") for span in spans)]:
        if found := re.match(r"(?:\$ )?cofuse (\S.*)", line):
            yield re.split(r"\s[#|>&;]|…|\.\.\.", found[1])[0].split()


def complaint(words: list[str]) -> str:
    """What is wrong with a command; "" when nothing."""
    command: Any = ROOT_COMMAND
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0).strip("[],.")
        if name not in command.commands:
            return f"cofuse {' '.join(words)}: there is no {name!r}"
        command = command.commands[name]
    known = {o for p in command.params for o in [*p.opts, *p.secondary_opts]} | {"--help"}
    for word in re.findall(r"(?<!\S)\[?(--[a-z][a-z0-9-]*)", " ".join(rest)):
        if word not in known:
            return f"cofuse {' '.join(words)}: there is no {word}"
    return ""


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in PAST], ids=lambda page: page.name
)
def test_a_page_shows_only_commands_that_there_are(page: Path) -> None:
    assert [words for words in map(complaint, shown(page)) if words] == []


def test_the_pages_show_most_of_the_commands() -> None:
    """Else the test above reads nothing."""
    found = {" ".join(words[:2]) for page in PAGES for words in shown(page)}
    assert {"round submit", "pivot pull", "coordinator init", "participant up"} <= found
    assert complaint(["rounds", "ls"])
    assert complaint(["round", "ls", "--al"])


@pytest.mark.parametrize(
    "name", ["logits-unified", "logits-pairwise", "weights", "weights-diloco", "pairs-preference"]
)
def test_an_example_of_a_round_is_read_without_a_fault(name: str, tmp_path: Path) -> None:
    """With files of the reader's own."""
    spec = tmp_path / "round.yaml"
    spec.write_bytes((ROOT / "examples" / f"{name}.yaml").read_bytes())
    (tmp_path / "prompts.jsonl").write_text('{"text": "A stenosis."}\n')
    pairs = [{"prompt": prompt, "chosen": "b", "rejected": "c"} for prompt in "ABCD"]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "evals.json").write_text('{"domains": {"heart": {"documents": ["A valve."]}}}')
    done = CliRunner().invoke(app, ["round", "check", str(spec)])
    assert done.exit_code == 0, done.stderr
