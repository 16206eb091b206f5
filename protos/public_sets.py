"""The two public files of a round: the prompt set (JSON lines) and the evaluation set (JSON)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

Domain = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]{0,39}$")]


class PublicSetError(ValueError):
    """A prompt or evaluation set that cannot be used; the message names file, line and cure."""


class Question(BaseModel):
    """One multiple-choice question."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    prompt: str
    options: tuple[str, ...] = Field(min_length=2)
    answer: int = Field(ge=0)
    """Index of the right option."""


class DomainSet(BaseModel):
    """Held-out material of one domain."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    documents: tuple[str, ...] = Field(min_length=1)
    questions: tuple[Question, ...] = ()


class EvalSet(BaseModel):
    """Held-out material by domain: what every model of a round is measured on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    domains: dict[Domain, DomainSet] = Field(min_length=1)


def read_prompts(path: Path) -> list[str]:
    """Documents of a prompt set in file order.

    Raises: PublicSetError naming the line that is not {"text": "..."}.
    """
    prompts: list[str] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = json.loads(line)["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise PublicSetError(
                    f'{path}:{number}: found {line[:60]!r}, wanted {{"text": "..."}}'
                ) from error
            if not isinstance(text, str) or not text:
                raise PublicSetError(f"{path}:{number}: the text is empty; leave the line out")
            prompts.append(text)
    if not prompts:
        raise PublicSetError(f"{path}: found no document, wanted at least one line")
    return prompts


def write_prompts(path: Path, texts: Iterable[str]) -> None:
    """Write one JSON line a document; the same texts give the same bytes."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_evals(path: Path) -> EvalSet:
    """Evaluation set of a round.

    Raises: PublicSetError.
    """
    try:
        return EvalSet.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise PublicSetError(f"{path}: {place}: {first['msg']}; see examples/README.md") from error
