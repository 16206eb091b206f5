"""Examination questions by letter: what is likeliest, what is written, and how sure that is."""

import pytest
import torch

from fusion.evaluate import ChoiceQuestion
from fusion.intervals import interval_or_none, share_interval
from fusion.letters import (
    LETTERS,
    letter_accuracy,
    lettered,
    said_letter,
    written_accuracy,
)
from fusion.models import ModelSpec, build_model, encode_text, eos_id, train_tokenizer
from fusion.scoreboard import scores_of
from protos.public_sets import MOST_LETTERS, DomainSet

RIGHT = {"Is it a cat?": 0, "Is it a dog?": 1, "Is it a cow?": 2, "Is it a rat?": 3}
QUESTIONS = [ChoiceQuestion(asked, ("w", "x", "y", "z"), right) for asked, right in RIGHT.items()]
TEMPLATE = (
    "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        (" B", "B"),
        ("(c). Because of it", "C"),
        ("The answer is D, not A.", "D"),
        ("A patient like this has influenza, so B", "B"),
        ("A\nBecause B is not", "A"),
        ("It must be B or rather C.", "C"),
        ("<think>A? no</think>\nB", "B"),
        ("B\n\nQuestion: ... Answer: C", "B"),
        ("none of these", ""),
        ("", ""),
    ],
)
def test_the_letter_that_an_answer_names(said: str, letter: str) -> None:
    assert said_letter(said) == letter


def test_a_question_shows_its_options_under_letters() -> None:
    assert len(LETTERS) == MOST_LETTERS
    assert lettered(QUESTIONS[0]) == "Is it a cat?\nA. w\nB. x\nC. y\nD. z\nAnswer:"


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_model_that_knows_the_letters_has_all_right_and_one_that_knows_others_none(
    template: str | None,
) -> None:
    def accuracies(shift: int) -> tuple[float, float]:
        texts = [f"{lettered(q)} {LETTERS[(q.answer + shift) % 4]}" for q in QUESTIONS]
        tokenizer = train_tokenizer(texts, 300)
        tokenizer.chat_template = template
        lead = "[{}]>{}" if template else "{} {}"
        told = [lead.format(lettered(q), LETTERS[(q.answer + shift) % 4]) for q in QUESTIONS]
        eos = eos_id(tokenizer)
        head = [] if template else [eos]
        rows = [[*head, *encode_text(tokenizer, text), eos] for text in told]
        spec = ModelSpec(
            architecture="llama", hidden_size=64, layers=1, heads=2,
            vocab_size=len(tokenizer), context=128,
        )  # fmt: skip
        model = build_model(spec, 0)
        width = max(map(len, rows))
        ids = torch.tensor([row + [eos] * (width - len(row)) for row in rows])
        labels = ids.clone()
        for at, row in enumerate(rows):
            labels[at, : len(row) - 3] = -100
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(60):
            optimizer.zero_grad()
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
        return (
            letter_accuracy(model, tokenizer, QUESTIONS),
            written_accuracy(model, tokenizer, QUESTIONS),
        )

    assert accuracies(0) == (1.0, 1.0)
    assert accuracies(1) == (0.0, 0.0)


def test_each_domain_is_measured_by_what_it_holds_and_long_questions_keep_their_options() -> None:
    tokenizer = train_tokenizer([lettered(q) for q in QUESTIONS], 300)
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2,
        vocab_size=len(tokenizer), context=48,
    )  # fmt: skip
    model = build_model(spec, 0)
    long = {"prompt": "It is. " * 50, "options": ["w", "x"], "answer": 0}
    domains = {
        "text": DomainSet(documents=("It is a cat",)),
        "facts": DomainSet.model_validate({"documents": ["a"], "questions": [long]}),
        "exam": DomainSet.model_validate({"questions": [long], "lettered": True}),
    }
    found = scores_of(model, tokenizer, domains)
    assert {measure: list(by_domain) for measure, by_domain in found.items()} == {
        "bpb": ["text", "facts"],
        "accuracy": ["facts"],
        "letter": ["exam"],
        "written": ["exam"],
    }


def test_no_question_and_too_many_options_are_refused() -> None:
    tokenizer = train_tokenizer(["Is it a cat?"], 300)
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=300, context=48
    )
    model = build_model(spec, 0)
    many = ChoiceQuestion("?", tuple("abcdefghijk"), 0)
    for measure in (letter_accuracy, written_accuracy):
        with pytest.raises(ValueError, match="no questions"):
            measure(model, tokenizer, [])
        with pytest.raises(ValueError, match="found 11 options, wanted at most 10"):
            measure(model, tokenizer, [many])
    with pytest.raises(ValueError, match="at most 10 options"):
        DomainSet.model_validate({
            "questions": [{"prompt": "?", "options": list(many.options), "answer": 0}],
            "lettered": True,
        })  # fmt: skip


def test_an_interval_holds_the_share_is_never_a_point_and_narrows_with_questions() -> None:
    widths = []
    for of in (10, 100, 1000):
        for share in (0.0, 0.25, 1.0):
            low, high = share_interval(share, of)
            assert 0 <= low <= share <= high <= 1
            assert low < high
        low, high = share_interval(0.25, of)
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    # Newcombe (1998), table I, 15 of 148.
    assert share_interval(15 / 148, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)
    assert interval_or_none(1.5, 10) is None
    assert interval_or_none(float("nan"), 10) is None
    assert interval_or_none(0.5, 0) is None
