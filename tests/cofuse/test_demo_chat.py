"""The chat at the demo's end: asked as a user asks, answered by the pivot's own words."""

import json
from pathlib import Path

import pytest

from cofuse.demo.chat import Exchange, ask_pivot, first_questions
from cofuse.demo.federation import FederationError
from tests.coordinator.finished_pivot import finished_pivot


def test_each_domain_gives_a_question_that_is_short_enough_to_read(tmp_path: Path) -> None:
    def question(prompt: str) -> dict[str, object]:
        return {"prompt": prompt, "options": ["no", "yes"], "answer": 1}

    domains = {
        "mixed": {"documents": ["x"], "questions": [question("a" * 400), question("Who?")]},
        "long": {"documents": ["x"], "questions": [question("a" * 500), question("b" * 400)]},
        "none": {"documents": ["x"]},
    }
    path = tmp_path / "evals.json"
    path.write_text(json.dumps({"domains": domains}))
    found = first_questions(path)
    assert found == [
        Exchange(domain="mixed", question="Who?", right="yes"),
        Exchange(domain="long", question="b" * 400, right="yes"),
    ]


@pytest.mark.slow
def test_the_pivot_is_asked_by_the_command_of_users(tmp_path: Path) -> None:
    pivot = finished_pivot(tmp_path)
    asked = [Exchange(domain=d, question=f"Code {d} is", right="left") for d in ("I2", "I9")]
    said = ask_pivot(pivot, asked)
    assert [(one.domain, one.right) for one in said] == [("I2", "left"), ("I9", "left")]
    assert all(one.answer for one in said)
    with pytest.raises(FederationError, match="no such folder"):
        ask_pivot(tmp_path / "nowhere", asked)
