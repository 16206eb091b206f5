"""Examination questions: options under letters, and the letter is the answer.

Two ways to ask: which letter is the likeliest next word, and which letter does the model write. The
first is smooth and cheap; the second is what a user meets, and counts an answer without a letter
as wrong.
Shapes: n = rows of a stream, V = vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Final

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion.evaluate import ChoiceQuestion
from fusion.models import context_length, encode_text, eos_id
from fusion.sampling import Row, Sampling, write
from fusion.scoring import score_streams

LETTERS: Final = "ABCDEFGHIJ"
NEW_TOKENS: Final = 32
"""Of a written answer; a letter comes early, or after a short thought."""
_ROWS: Final = 32
"""Answers written side by side."""
_THOUGHT: Final = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)
_FIRST: Final = re.compile(
    r"\A\W*(?:(?:the\s+)?answer\s*(?:is)?\W*)?([A-J])(?=[).:,;]|\s*(?:\n|\Z))", re.I
)
_ALONE: Final = re.compile(r"(?<![A-Za-z0-9])([A-J])(?![A-Za-z0-9'])")


def lettered(question: ChoiceQuestion) -> str:
    """The question with its options, a line each, and the call for an answer."""
    lines = (f"{x}. {option}" for x, option in zip(LETTERS, question.options, strict=False))
    return "\n".join([question.prompt, *lines, "Answer:"])


def said_letter(text: str) -> str:
    """Which letter an answer names: the one it begins with, else the last that stands alone.

    "A patient ..." begins with an article and with no letter. What comes after the first paragraph
    is not the answer: a model that does not stop goes on with questions of its own. "" when there
    is none.
    """
    told = _THOUGHT.sub("", text).strip().partition("\n\n")[0]
    if begun := _FIRST.match(told):
        return begun[1].upper()
    alone = _ALONE.findall(told)
    return alone[-1] if alone else ""


def letter_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[ChoiceQuestion]
) -> float:
    """Return the share of questions whose right letter is the likeliest next word.

    Raises: ValueError when there is no question, or one has more options than there are letters.
    """
    _check(questions)
    letters, shared = _letters(tokenizer)
    room = context_length(model) - len(shared)
    # The last id is never read: it makes the row before it predict.
    streams = [[*_prompt(tokenizer, q, room), *shared, letters[0]] for q in questions]
    right = 0
    for stream, start, logprobs, labels in score_streams(model, streams):
        if start + len(labels) == len(streams[stream]) - 1:
            question = questions[stream]
            options = logprobs[-1, letters[: len(question.options)]]
            right += int(int(options.argmax()) == question.answer)
    return right / len(questions)


def written_accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Sequence[ChoiceQuestion]
) -> float:
    """Return the share of questions to which the model, writing its likeliest words, says so.

    Raises: as `letter_accuracy`; GenerateError when its logits are not finite.
    """
    _check(questions)
    room = max(1, context_length(model) - NEW_TOKENS)
    ends = model.generation_config.eos_token_id if model.generation_config else None
    told = ends if isinstance(ends, list) else [] if ends is None else [ends]
    sampling = Sampling(temperature=0.0, ends=frozenset({eos_id(tokenizer), *told}))
    noise = np.random.default_rng(0)  # nothing is drawn at temperature 0
    rows = [
        Row(at, _prompt(tokenizer, question, room), NEW_TOKENS, noise)
        for at, question in enumerate(questions)
    ]
    order = sorted(rows, key=lambda row: (len(row.ids), row.index))
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(order), _ROWS):
            for _ in write(model, order[first : first + _ROWS], sampling):
                pass
    finally:
        model.train(was_training)
    said = [said_letter(tokenizer.decode(row.written, skip_special_tokens=True)) for row in rows]
    right = sum(x == LETTERS[q.answer] for x, q in zip(said, questions, strict=True))
    return right / len(questions)


def _check(questions: Sequence[ChoiceQuestion]) -> None:
    if not questions:
        raise ValueError("there are no questions: give at least one")
    if (most := max(len(q.options) for q in questions)) > len(LETTERS):
        raise ValueError(f"found {most} options, wanted at most {len(LETTERS)}: A to J")


def _prompt(tokenizer: PreTrainedTokenizerFast, question: ChoiceQuestion, room: int) -> list[int]:
    """What the model reads, by its chat template where it has one; its end, if it is too long."""
    text = lettered(question)
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": text}]
        told = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = list(tokenizer(told, add_special_tokens=False)["input_ids"])
    else:
        ids = [eos_id(tokenizer), *encode_text(tokenizer, text)]
    # The options come last, and the beginning of a document stays its beginning.
    return ids if len(ids) <= room else [*ids[:1], *ids[len(ids) - room + 1 :]]


def _letters(tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """The ids that tell the letters apart, and those that all letters have before them."""
    lead = "" if tokenizer.chat_template else " "
    found = [encode_text(tokenizer, lead + letter, prefixed=False) for letter in LETTERS]
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*found, strict=False))
    shared = [column[0] for column in columns]
    return [ids[len(shared)] for ids in found], shared
