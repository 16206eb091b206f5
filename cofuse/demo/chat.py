"""The end of the demo: the pivot is asked about a fact of each hospital, as a user would ask it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from cofuse.demo.federation import FederationError
from protos.public_sets import read_evals

_NEW_TOKENS: Final = 24
"""Of an answer: a name is shorter, and a small model does not know when to stop."""
_LONGEST: Final = 300
"""Characters of a question: it is to be read at a glance, and to leave room in the context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """A question to the pivot, and what it said."""

    domain: str
    question: str
    right: str
    answer: str = ""


def first_questions(evals: Path) -> list[Exchange]:
    """A question of each domain: its first one that is not long, else its shortest."""
    found = []
    for domain, held in read_evals(evals).domains.items():
        if held.questions:
            brief = [q for q in held.questions if len(q.prompt) <= _LONGEST]
            q = brief[0] if brief else min(held.questions, key=lambda q: len(q.prompt))
            found.append(Exchange(domain=domain, question=q.prompt, right=q.options[q.answer]))
    return found


def ask_pivot(folder: Path, questions: Sequence[Exchange]) -> list[Exchange]:
    """Ask by the very command of users, in one process, which alone loads torch.

    Raises: FederationError.
    """
    if not questions:
        return []
    asks = [word for one in questions for word in ("--ask", one.question)]
    limit = ["--max-new-tokens", str(_NEW_TOKENS)]
    command = ["-m", "cofuse.cli", "pivot", "chat", str(folder), *asks, *limit, "--json"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise FederationError(f"cofuse pivot chat {folder}: {done.stderr.strip()[-1500:]}")
    answers = json.loads(done.stdout)["data"]["answers"]
    return [
        replace(one, answer=" ".join(said["answer"].split()))
        for one, said in zip(questions, answers, strict=True)
    ]
