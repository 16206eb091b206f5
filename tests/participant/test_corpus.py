"""The corpus reader names the line that is wrong and never quotes it."""

from pathlib import Path

import pytest

from participant.corpus import CorpusError, read_corpus


def test_documents_come_in_file_order(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two", "id": 7}\n')
    assert read_corpus(path) == ["one", "two"]


def test_a_broken_line_is_named_but_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one"}\nMrs Miller, 54, chest pain\n')
    with pytest.raises(CorpusError, match=r"c\.jsonl:2") as caught:
        read_corpus(path)
    assert "Miller" not in str(caught.value)


@pytest.mark.parametrize("text", ["", '{"text": ""}\n', '{"text": 5}\n'])
def test_an_empty_corpus_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(text)
    with pytest.raises(CorpusError):
        read_corpus(path)
    with pytest.raises(CorpusError, match="no such file"):
        read_corpus(tmp_path / "none")
