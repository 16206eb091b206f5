"""The two public files of a round: the prompt set (JSON lines) and the evaluation set (JSON)."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Final, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

Domain = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9 _-]{0,39}$")]

MOST_LETTERS: Final = 10
"""A to J; fusion.letters.LETTERS."""


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
    documents: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    lettered: bool = False
    """The options are shown under letters and a letter is the answer, as in examinations."""

    @model_validator(mode="after")
    def _has_material(self) -> Self:
        if not self.documents and not self.questions:
            raise ValueError("found neither documents nor questions, wanted some of either")
        if self.lettered and any(len(q.options) > MOST_LETTERS for q in self.questions):
            raise ValueError(f"lettered questions have at most {MOST_LETTERS} options, A to J")
        return self


class EvalSet(BaseModel):
    """Held-out material by domain: what every model of a round is measured on."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    domains: dict[Domain, DomainSet] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if not any(domain.documents for domain in self.domains.values()):
            raise ValueError("no domain has documents, and bits per byte want held-out text of one")
        return self

    def counts(self) -> dict[str, int]:
        """Questions of each domain that has any: what a share of right answers is a share of."""
        return {name: len(d.questions) for name, d in self.domains.items() if d.questions}


class Prompt(BaseModel):
    """One document of a prompt set."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    text: str = Field(min_length=1)
    domain: Domain | None = None
    """What it is about, if anybody said; credit is told by domain."""
    written: bool = False
    """Whether the pivot wrote it (an on-policy round): nothing to learn by heart."""


def read_prompt_set(path: Path) -> list[Prompt]:
    """Documents of a prompt set in file order, with what is said about each.

    Raises: PublicSetError naming the line that is not {"text": "..."}.
    """
    prompts: list[Prompt] = []
    with path.open("rb") as file:  # what is no UTF-8 is a line like any other that is no document
        for number, line in enumerate(file, start=1):
            try:
                prompts.append(Prompt.model_validate_json(line))
            except ValidationError as error:
                start = line[:60].decode(errors="replace")
                raise PublicSetError(
                    f'{path}:{number}: found {start!r}, wanted {{"text": "..."}} with a text '
                    f"that is not empty ({error.errors()[0]['msg']})"
                ) from error
    if not prompts:
        raise PublicSetError(f"{path}: found no document, wanted at least one line")
    return prompts


def read_prompts(path: Path) -> list[str]:
    """Texts of a prompt set in file order. Raises: PublicSetError."""
    return [prompt.text for prompt in read_prompt_set(path)]


def write_prompts(path: Path, prompts: Iterable[str | Prompt]) -> None:
    """Write one JSON line a document; the same documents give the same bytes."""
    said = (p if isinstance(p, Prompt) else Prompt(text=p) for p in prompts)
    lines = (json.dumps(p.model_dump(exclude_defaults=True), ensure_ascii=False) for p in said)
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
