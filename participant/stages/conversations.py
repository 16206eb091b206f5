"""Conversations as a model reads them: chat template, which tokens are answers, what is skipped.

A file holds one conversation a line: {"messages": [{"role": "user", "content": "..."}, ...]}. What
cannot be used is skipped and counted by its reason; a line itself is never quoted, for logs may
leave and text may not.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from participant.corpus import CorpusError

Message = dict[str, str]
Reason = Literal[
    "not JSON", "no messages", "unknown role", "no text", "no answer", "control token",
    "template refuses", "too long",
]  # fmt: skip
ROLES: Final = ("system", "user", "assistant")
PLAIN_TEMPLATE: Final = (
    "{{ eos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {{ message.content }}{{ eos_token }}\n"
    "{% else %}{{ message.role | capitalize }}: {{ message.content }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For tokenizers that bring none: words for the roles, eos around it as around any document."""
_PROBE: Final[list[Message]] = [
    {"role": "user", "content": "question"},
    {"role": "assistant", "content": "answer"},
]


class ChatError(CorpusError):
    """Conversations or their template cannot be used; the message says what to change."""


class UnusableError(Exception):
    """A line that cannot be used."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


@dataclass(slots=True)
class Skipped:
    """What was left out, by reason, and the first line where it was met."""

    counts: Counter[str] = field(default_factory=Counter)
    first_line: dict[str, int] = field(default_factory=dict)

    def add(self, reason: str, line: int) -> None:
        """Count one."""
        self.counts[reason] += 1
        self.first_line.setdefault(reason, line)

    def __str__(self) -> str:
        """Say it in one line; "" when nothing was skipped."""
        told = [f"{n} {reason} (first in line {self.first_line[reason]})"
                for reason, n in self.counts.most_common()]  # fmt: skip
        return ", ".join(told)


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens that are read together, and which of them are learned."""

    ids: list[int]
    answers: tuple[tuple[int, int], ...]
    """[start, stop) of each answer, the token that ends it included."""


class Chat:
    """A tokenizer with a chat template, checked once."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, template: str | None = None) -> None:
        """Give the tokenizer its template: the one asked for, else its own, else PLAIN_TEMPLATE.

        Raises: ChatError when the template fails, or ends an answer in no special token: a model
            that learned from it would never stop.
        """
        tokenizer.chat_template = template or tokenizer.chat_template or PLAIN_TEMPLATE
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._special = {i: str(token) for i, token in added if token.special}
        try:
            asked, told = self._render(_PROBE[:1], ask=True), self._render(_PROBE)
        except UnusableError as error:
            raise ChatError(f"the chat template fails: {error.__cause__}; give another") from error
        ids = self._encode(told[len(asked) :]) if told.startswith(asked) else []
        ends = [i for i in ids if i in self._special]
        if not ends:
            raise ChatError(
                "the chat template ends no answer in a special token after its generation prompt, "
                "so the model would not learn to stop; end answers in {{ eos_token }}"
            )
        self.end_id: int = ends[-1]
        """The token that ends an answer."""

    @property
    def end_ids(self) -> list[int]:
        """Tokens at which generation stops: the answer's end, and the document's."""
        eos = self.tokenizer.eos_token_id
        return sorted({self.end_id} | ({int(eos)} if eos is not None else set()))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids up to where the next answer begins. Raises: UnusableError."""
        self._refuse_control_tokens(messages)
        return self._encode(self._render(messages, ask=True))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of an answer without its end."""
        kept = [i for i in ids if i not in self._special]
        text: str = self.tokenizer.decode(kept, clean_up_tokenization_spaces=False)
        return text

    def examples(self, messages: Sequence[Message], limit: int) -> tuple[list[Example], int]:
        """What is learned from a conversation of at most `limit` tokens.

        Mostly one example with all answers. A template that tells the past otherwise once it is
        past (without the reasoning, say) gives one for each answer, as the model will read it.

        Returns: examples, and how many answers were left out because they end after `limit`.
        Raises: UnusableError.
        """
        self._refuse_control_tokens(messages)
        found: list[Example] = []
        text, ids, spans, cut = "", list[int](), list[tuple[int, int]](), 0
        for at, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            asked = self._render(messages[:at], ask=True)
            told = self._render(messages[: at + 1])
            if not told.startswith(asked) or not asked:  # the first token is never predicted
                raise UnusableError("template refuses")
            if not asked.startswith(text):
                found += _closed(ids, spans)
                text, ids, spans = "", [], []
            begun = self._extended(ids, text, asked)
            text, ids = told, self._extended(begun, asked, told)
            stop = self._stop(ids, len(begun))
            if stop <= limit:
                spans.append((len(begun), stop))
            else:
                cut += 1
        return found + _closed(ids, spans), cut

    def _render(self, messages: Sequence[Message], *, ask: bool = False) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=ask
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            raise UnusableError("template refuses") from error
        return text

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False)
        return ids

    def _extended(self, ids: list[int], text: str, longer: str) -> list[int]:
        """Ids of `longer` that begin with those of `text`, which the model will have read."""
        whole = self._encode(longer)
        return whole if whole[: len(ids)] == ids else ids + self._encode(longer[len(text) :])

    def _stop(self, ids: list[int], start: int) -> int:
        """Just past the token that ends the answer; what the template adds is not learned."""
        ends = [at for at in range(start, len(ids)) if ids[at] in self._special]
        if not ends:
            raise UnusableError("template refuses")
        return ends[-1] + 1

    def _refuse_control_tokens(self, messages: Iterable[Message]) -> None:
        # Read as text they would be commands: a question could end itself and begin an answer.
        for message in messages:
            if any(name in message["content"] for name in self._special.values()):
                raise UnusableError("control token")


def read_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of each line that is not blank; UnusableError stands for what is no JSON.

    Raises: ChatError when there is no such file.
    """
    if not path.is_file():
        raise ChatError(f"{path}: there is no such file; set `data` of the stage")
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError):
                    yield number, UnusableError("not JSON")


def messages_of(value: Any, *, answered: bool = True) -> list[Message]:
    """Check the messages of one line. Raises: UnusableError."""
    if isinstance(value, UnusableError):
        raise value
    given = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(given, list) or not given or not all(isinstance(m, dict) for m in given):
        raise UnusableError("no messages")
    if any(message.get("role") not in ROLES for message in given):
        raise UnusableError("unknown role")
    texts = [message.get("content") for message in given]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise UnusableError("no text")
    if answered and not any(message["role"] == "assistant" for message in given):
        raise UnusableError("no answer")
    return [{"role": m["role"], "content": m["content"]} for m in given]


def question_of(value: Any) -> tuple[list[Message], str]:
    """Check a line of a task: what is asked, and the answer that can be checked.

    Raises: UnusableError.
    """
    messages = messages_of(value, answered=False)
    right = value.get("answer")
    if not isinstance(right, str) or messages[-1]["role"] != "user":
        raise UnusableError("no answer")
    return messages, right


def read_conversations(path: Path, skipped: Skipped) -> Iterator[tuple[int, list[Message]]]:
    """Line number and messages of each conversation that can be used; the others are counted."""
    for number, value in read_lines(path):
        try:
            yield number, messages_of(value)
        except UnusableError as error:
            skipped.add(error.reason, number)


def _closed(ids: list[int], spans: list[tuple[int, int]]) -> list[Example]:
    return [Example(ids[: spans[-1][1]], tuple(spans))] if spans else []
