"""Prompt and evaluation sets: what is written reads back, what is wrong is named by line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.public_sets import (
    Prompt,
    PublicSetError,
    read_evals,
    read_prompt_set,
    read_prompts,
    write_prompts,
)


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), min_size=1, max_size=8))
def test_prompts_read_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    write_prompts(path, texts)
    assert read_prompts(path) == texts


def test_what_is_said_of_a_prompt_reads_back(tmp_path: Path) -> None:
    said = [Prompt(text="a"), Prompt(text="b", domain="heart"), Prompt(text="c", written=True)]
    write_prompts(tmp_path / "p.jsonl", said)
    assert read_prompt_set(tmp_path / "p.jsonl") == said
    assert (tmp_path / "p.jsonl").read_text().splitlines()[0] == '{"text": "a"}'


@pytest.mark.parametrize("line", ["{}", "plain", '{"text": 3}', '{"text": ""}', "[1]"])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(PublicSetError, match=r"prompts\.jsonl:2"):
        read_prompts(path)


@pytest.mark.parametrize(
    "text", ["", "{}", '{"domains": {}}', '{"domains": {"a": {"documents": []}}}', '{"d": 1}']
)
def test_a_wrong_evaluation_set_is_a_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "evals.json"
    path.write_text(text)
    with pytest.raises(PublicSetError, match=r"evals\.json"):
        read_evals(path)
