"""Everything that is measured of a model on a round's evaluation set, by measure and domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion.evaluate import ChoiceQuestion, bits_per_byte, choice_accuracy
from fusion.letters import letter_accuracy, written_accuracy
from protos.public_sets import DomainSet

OF_QUESTIONS: Final[Mapping[bool, Mapping[str, Callable[..., float]]]] = {
    False: {"accuracy": choice_accuracy},
    True: {"letter": letter_accuracy, "written": written_accuracy},
}
"""How questions are asked: by whether their options stand under letters."""


def scores_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, domains: Mapping[str, DomainSet]
) -> dict[str, dict[str, float]]:
    """Return bpb, accuracy, letter and written by domain; a measure without material is empty."""
    found: dict[str, dict[str, float]] = {"bpb": {}, "accuracy": {}, "letter": {}, "written": {}}
    for name, domain in domains.items():
        if domain.documents:
            found["bpb"][name] = bits_per_byte(model, tokenizer, domain.documents)
        asked = [ChoiceQuestion(q.prompt, q.options, q.answer) for q in domain.questions]
        for measure, share in OF_QUESTIONS[domain.lettered].items() if asked else ():
            found[measure][name] = share(model, tokenizer, asked)
    return found
