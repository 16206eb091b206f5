"""Rewards that can be checked: plain functions of an answer and the right one, by name.

A reward of one's own is a function put into REWARDS before the stage begins. One that raises, or
returns what is no finite number, costs its sample and not the run: it is counted.
"""

import math
import re
from collections.abc import Callable, Mapping
from decimal import Decimal, InvalidOperation
from typing import Final

Reward = Callable[[str, str], float]
"""(what the model said, the right answer) -> how good it is; 1 is right, 0 is wrong."""
_THOUGHT: Final = re.compile(r"\A\s*<think>.*?</think>(.*)\Z", re.DOTALL)
_LETTER: Final = re.compile(r"(?<![A-Za-z0-9])([A-J])(?![A-Za-z0-9'])")
_NUMBER: Final = re.compile(r"[-+]?(?:\d[\d,]*)(?:\.\d+)?")


def exact(said: str, right: str) -> float:
    """Whether the conclusion is the right answer, but for case and white space."""
    return float(
        " ".join(conclusion(said).casefold().split()) == " ".join(right.casefold().split())
    )


def letter(said: str, right: str) -> float:
    """Whether the last letter A to J that stands alone is the right choice: "(B)", "it is B."."""
    found = _LETTER.findall(conclusion(said))
    return float(bool(found) and found[-1] == right.strip().strip("().").upper())


def number(said: str, right: str) -> float:
    """Whether the last number said equals the right one: 1,200.0 is 1200.

    Raises: ValueError when the right answer is no number.
    """
    try:
        wanted = Decimal(right.strip().replace(",", ""))
    except InvalidOperation as error:
        raise ValueError(f"found the answer {right[:20]!r}, wanted a number") from error
    found = _NUMBER.findall(conclusion(said))
    return float(bool(found) and Decimal(found[-1].replace(",", "")) == wanted)


def thinks(said: str, _right: str) -> float:
    """Whether the answer has the form <think>...</think> and then a conclusion."""
    match = _THOUGHT.match(said)
    once = said.count("<think>") == said.count("</think>") == 1
    return float(once and match is not None and bool(match[1].strip()))


REWARDS: Final[dict[str, Reward]] = {
    "exact": exact,
    "letter": letter,
    "number": number,
    "format": thinks,
}


def conclusion(said: str) -> str:
    """What is said after thinking; all of it when nothing was thought."""
    match = _THOUGHT.match(said)
    return match[1] if match else said


def reward(weights: Mapping[str, float], said: str, right: str) -> float | None:
    """Sum the named rewards by their weights; None when one of them fails.

    Raises: KeyError for a name that REWARDS does not hold.
    """
    functions = [(REWARDS[name], weight) for name, weight in weights.items()]
    try:
        total = sum(weight * float(function(said, right)) for function, weight in functions)
    except Exception:  # noqa: BLE001 - anybody's function; its fault costs its sample, not the run
        return None
    return total if math.isfinite(total) else None
