"""The private text. This module reads it; nothing else in the daemon does."""

import codecs
import json
from pathlib import Path


class CorpusError(ValueError):
    """The corpus cannot be used; the message names file, line and cure."""


def read_corpus(path: Path) -> list[str]:
    """Documents of a JSON-lines file of {"text": ...}; lines without anything are passed over.

    Raises: CorpusError. The line itself is never quoted: logs may leave, text may not.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise CorpusError(
            f"{path}: found {what}, wanted a file of JSON lines; set `corpus` in participant.toml"
        )
    documents: list[str] = []
    with path.open("rb") as file:  # what is no UTF-8 is a line like any other that is no document
        for number, line in enumerate(file, start=1):
            if not (row := line.removeprefix(codecs.BOM_UTF8).strip()):
                continue
            try:
                text = _text(row)
            except ValueError as error:
                raise CorpusError(f"{path}:{number}: {error}") from None
            if text.strip():
                documents.append(text)
    if not documents:
        raise CorpusError(f"{path}: found no document, wanted at least one that is not empty")
    return documents


def _text(row: bytes) -> str:
    """The text of one line. Raises: ValueError that quotes nothing of it."""
    try:
        found = json.loads(row.decode())
        text = found["text"]
        text.encode()  # half a surrogate pair is JSON, and no tokenizer takes it
    except UnicodeEncodeError:
        raise ValueError("found half a character (\\ud800 and such), wanted whole ones") from None
    except UnicodeDecodeError:
        raise ValueError("found bytes that are no UTF-8: save the file as UTF-8") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError('found something else, wanted {"text": "..."}') from None
    return str(text)
