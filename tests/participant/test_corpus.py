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


def test_what_editors_leave_in_a_file_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "t\xc3\xa9"}\r\n{"text": " "}\n\n'
    )
    assert read_corpus(path) == ["one", "té"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"text": "f\xfcr"}', "no UTF-8"),
        (b"\x00\x01\xff", "no UTF-8"),
        (b'{"text": "\\ud800"}', "half a character"),
        (b'{"text": 5}', "something else"),
        (b'["text"]', "something else"),
        (b"[" * 100_000, "something else"),
    ],
)
def test_a_line_that_is_no_document_is_named_whatever_it_holds(
    tmp_path: Path, line: bytes, says: str
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b"\n")
    with pytest.raises(CorpusError, match=rf"c\.jsonl:3: .*{says}"):
        read_corpus(path)


def test_a_folder_is_no_corpus(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="found a folder, wanted a file"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("text", ["", '{"text": ""}\n', "\n\n"])
def test_an_empty_corpus_is_an_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(text)
    with pytest.raises(CorpusError):
        read_corpus(path)
    with pytest.raises(CorpusError, match="no such file"):
        read_corpus(tmp_path / "none")
