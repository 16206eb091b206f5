from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel

from fusion.codec import LogitContribution, check_logits, write_logits
from fusion.extract import extract_logits, hash_tokenizer, score_streams
from fusion.models import ModelSpec, TokenizerError, build_model, encode_text, train_tokenizer

PROMPTS = [
    "Code I63.9 is cerebral infarction, unspecified.",
    "caf\u00e9 \U0001f600",
    "",
    "Malignant neoplasm of breast. " * 14,
]
TOKENIZER = train_tokenizer(PROMPTS * 3, 300)
CONTEXT = 24


def model(context: int = CONTEXT) -> PreTrainedModel:
    spec = ModelSpec(
        architecture="llama",
        hidden_size=32,
        layers=1,
        heads=2,
        vocab_size=len(TOKENIZER),
        context=context,
    )
    return build_model(spec, 0)


def extracted(
    prompts: list[str] = PROMPTS, context: int = 256, top_k: int = 8
) -> LogitContribution:
    return extract_logits(
        model(context),
        TOKENIZER,
        prompts,
        top_k=top_k,
        prompt_set_sha256="a" * 64,
        model_sha256="b" * 64,
    )


def test_every_row_is_what_the_model_says_after_eos_and_the_tokens_before() -> None:
    found = extracted()
    net = model(256)
    for doc, (first, last) in enumerate(pairwise(found.doc_offsets.tolist())):
        ids = [0, *encode_text(TOKENIZER, PROMPTS[doc]), 0]
        with torch.no_grad():
            logprobs = net(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1).numpy()
        assert found.token_ids[first:last].tolist() == ids[1:]
        own = logprobs[np.arange(len(ids) - 1), ids[1:]]
        assert found.own_logprob[first:last] == pytest.approx(own, abs=5e-3)
        top = np.sort(logprobs, axis=-1)[:, ::-1][:, :8]
        assert found.topk_logprobs[first:last] == pytest.approx(top, abs=5e-3)
        chosen = np.take_along_axis(logprobs, found.topk_ids[first:last].astype(np.int64), -1)
        assert chosen == pytest.approx(top, abs=1e-4)
        tail = np.log(1 - np.exp(top).sum(-1))
        assert found.tail_logprob[first:last] == pytest.approx(tail, abs=5e-3)


def test_what_is_extracted_passes_the_coordinators_check(tmp_path: Path) -> None:
    write_logits(tmp_path / "c", extracted(context=CONTEXT))
    prompts = [prompt.encode() for prompt in PROMPTS]
    check_logits(tmp_path / "c", prompt_set_sha256="a" * 64, top_k=8, prompts_bytes=prompts)


def test_later_text_changes_no_earlier_row() -> None:
    long = extracted([PROMPTS[0] + " Also called stroke."])
    short = extracted([PROMPTS[0]])
    rows = short.header.positions - 1
    assert np.array_equal(long.own_logprob[:rows], short.own_logprob[:rows])
    assert np.array_equal(long.topk_ids[: rows + 1], short.topk_ids[: rows + 1])


def test_a_document_longer_than_the_context_is_scored_once_and_never_with_less_than_half() -> None:
    stream = [0, *encode_text(TOKENIZER, PROMPTS[3]), 0]
    assert len(stream) > 1.9 * CONTEXT
    scored = [(start, labels.tolist()) for _, start, _, labels in score_streams(model(), [stream])]
    scored.sort()
    assert [label for _, labels in scored for label in labels] == stream[1:]
    for start, labels in scored[1:]:
        assert len(labels) <= CONTEXT // 2
        assert start >= CONTEXT // 2
    for _, start, logprobs, labels in score_streams(model(), [stream]):
        seen = stream[max(0, start + len(labels) - CONTEXT) : start + len(labels)]
        with torch.no_grad():
            wanted = model()(torch.tensor([seen])).logits[0, -len(labels) :].log_softmax(-1)
        assert torch.allclose(logprobs, wanted, atol=1e-4)


def test_neighbours_in_a_batch_change_nothing_that_is_stored() -> None:
    together = extracted()
    for doc, (first, last) in enumerate(pairwise(together.doc_offsets.tolist())):
        alone = extracted([PROMPTS[doc]])
        assert alone.own_logprob == pytest.approx(together.own_logprob[first:last], abs=5e-3)


def test_all_ids_can_be_kept_and_leave_an_empty_tail() -> None:
    found = extracted([PROMPTS[0]], top_k=len(TOKENIZER))
    assert (found.tail_logprob == -60).all()


def test_a_tokenizer_that_is_not_byte_level_is_refused() -> None:
    word = TOKENIZER.__class__(
        tokenizer_object=Tokenizer(WordLevel({"\u2581a": 1, "</s>": 0}, unk_token="</s>")),
        eos_token="</s>",
    )
    with pytest.raises(TokenizerError, match="byte-level"):
        extract_logits(
            model(), word, ["a"], top_k=2, prompt_set_sha256="a" * 64, model_sha256="b" * 64
        )


def test_a_tokenizer_is_named_by_what_it_does() -> None:
    assert hash_tokenizer(TOKENIZER) == hash_tokenizer(train_tokenizer(PROMPTS * 3, 300))
    assert hash_tokenizer(TOKENIZER) != hash_tokenizer(train_tokenizer(PROMPTS, 280))
