import math

import pytest
import torch
from transformers import PreTrainedModel

from fusion.evaluate import (
    ChoiceQuestion,
    bits_per_byte,
    choice_accuracy,
    recovery,
    rolling_bits_per_byte,
)
from fusion.models import ModelSpec, build_model, encode_text, train_tokenizer

TEXTS = ["Code I63.9 is a stroke.", "Neoplasm of breast, caf\u00e9."]
TOKENIZER = train_tokenizer(TEXTS * 5, 300)


def model() -> PreTrainedModel:
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(TOKENIZER)
    )
    return build_model(spec, 0)


def nats(net: PreTrainedModel, ids: list[int], first: int = 1) -> float:
    with torch.no_grad():
        logprobs = net(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return -sum(float(logprobs[i - 1, ids[i]]) for i in range(first, len(ids)))


def test_bits_per_byte_is_the_summed_surprise_with_eos_over_the_utf8_bytes() -> None:
    net = model()
    total = sum(nats(net, [0, *encode_text(TOKENIZER, text), 0]) for text in TEXTS)
    wanted = total / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert bits_per_byte(net, TOKENIZER, TEXTS) == pytest.approx(wanted, rel=1e-5)
    assert bits_per_byte(net, TOKENIZER, TEXTS[::-1]) == pytest.approx(wanted, rel=1e-5)


def test_rolling_bits_leave_the_end_out_and_windows_do_not_overlap() -> None:
    net = model()
    long = TEXTS[0] * 9
    ids = [0, *encode_text(TOKENIZER, long)]
    net.config.max_position_embeddings = 16
    # Where a window begins only its first token is known; the last one is filled from the left.
    firsts = [ids[at : at + 17] for at in range(0, len(ids) - 17, 16)]
    rest = (len(ids) - 1) % 16 or 16
    total = sum(nats(net, window) for window in firsts)
    total += nats(net, ids[-17:], 17 - rest)
    wanted = (total + nats(net, [0, *encode_text(TOKENIZER, "x")])) / math.log(2)
    found = rolling_bits_per_byte(net, TOKENIZER, [long, "", "x"])
    assert found == pytest.approx(wanted / (len(long.encode()) + 1), rel=1e-5)


def test_a_uniform_model_needs_log_of_the_vocabulary_per_token() -> None:
    net = model()
    with torch.no_grad():
        net.lm_head.weight.zero_()
    tokens = sum(len(encode_text(TOKENIZER, text)) + 1 for text in TEXTS)
    wanted = tokens * math.log2(len(TOKENIZER)) / sum(len(text.encode()) for text in TEXTS)
    assert bits_per_byte(net, TOKENIZER, TEXTS) == pytest.approx(wanted, rel=1e-5)


def test_no_text_and_no_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(model(), TOKENIZER, [""])
    with pytest.raises(ValueError, match="no questions"):
        choice_accuracy(model(), TOKENIZER, [])


def test_the_option_that_the_prompt_makes_likelier_is_chosen() -> None:
    net = model()
    options = (" stroke", "Neoplasm", "breast of a Code", "is")
    prompt = encode_text(TOKENIZER, "Code I63.9 is")
    gains = []
    for option in options:
        ids = encode_text(TOKENIZER, " " + option)
        with_prompt = nats(net, [0, *prompt, *ids], 1 + len(prompt))
        gains.append(nats(net, [0, *ids]) - with_prompt)
    right = gains.index(max(gains))
    for answer in range(4):
        question = ChoiceQuestion("Code I63.9 is", options, answer)
        assert choice_accuracy(net, TOKENIZER, [question]) == float(answer == right)
    both = [ChoiceQuestion("Code I63.9 is", options, k) for k in (right, (right + 1) % 4)]
    assert choice_accuracy(net, TOKENIZER, both) == 0.5


@pytest.mark.parametrize("neutral", ["", "Answer:", "Code I63.9 is"])
def test_an_option_gains_over_what_stands_before_it_when_nobody_asks(neutral: str) -> None:
    net = model()
    prompt = "Neoplasm of"

    def nats_after(before: str, option: str) -> float:
        head = [0, *(encode_text(TOKENIZER, before) if before else [])]
        return nats(net, [*head, *encode_text(TOKENIZER, " " + option)], len(head))

    options = ("stroke", "breast", "Code", "is a Neoplasm", "caf\u00e9", "I63")
    gains = [nats_after(neutral, option) - nats_after(prompt, option) for option in options]
    right = gains.index(max(gains))
    for answer in range(len(options)):
        question = ChoiceQuestion(prompt, options, answer)
        assert choice_accuracy(net, TOKENIZER, [question], neutral) == float(answer == right)


def test_a_prompt_that_is_the_neutral_text_tells_nothing() -> None:
    questions = [ChoiceQuestion("Answer:", ("stroke", "is", "breast"), k) for k in range(3)]
    # All options gain exactly 0, and the first of equal scores is chosen.
    assert choice_accuracy(model(), TOKENIZER, questions, "Answer:") == 1 / 3


def test_recovery_counts_from_base_to_pooled() -> None:
    assert recovery(3.0, 3.0, 2.0) == 0
    assert recovery(3.0, 2.0, 2.0) == 1
    assert recovery(3.0, 3.5, 2.0) == -0.5
    with pytest.raises(ValueError, match="not better"):
        recovery(3.0, 2.5, 3.0)
