"""The private text. This module reads it; nothing else in the daemon does."""

import json
from pathlib import Path


class CorpusError(ValueError):
    """The corpus cannot be used; the message names file, line and cure."""


def read_corpus(path: Path) -> list[str]:
    """Documents of a JSON-lines file of {"text": ...}.

    Raises: CorpusError. The line itself is never quoted: logs may leave, text may not.
    """
    if not path.exists():
        raise CorpusError(f"{path}: there is no such file; set `corpus` in participant.toml")
    documents: list[str] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise CorpusError(
                    f'{path}:{number}: wanted {{"text": "..."}}; found something else'
                ) from error
            if isinstance(text, str) and text:
                documents.append(text)
    if not documents:
        raise CorpusError(f"{path}: found no document, wanted at least one")
    return documents
