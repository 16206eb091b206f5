from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel

from fusion import extract
from fusion.budget import Budget, gains
from fusion.byte_tables import TokenizerError, hash_tokenizer
from fusion.codec import check_logits, write_logits
from fusion.contribution import ContributionError, LogitContribution
from fusion.extract import Options, extract_logits, extract_to_file
from fusion.models import ModelSpec, build_model, encode_text, train_tokenizer
from fusion.scoring import score_streams

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


WANTED: Options = {"top_k": 8, "prompt_set_sha256": "a" * 64, "model_sha256": "b" * 64}


def extracted(
    prompts: list[str] = PROMPTS, context: int = 256, **options: Any
) -> LogitContribution:
    wanted: Any = WANTED | options
    return extract_logits(model(context), TOKENIZER, prompts, **wanted)


def pivot_of(prompts: list[str] = PROMPTS) -> LogitContribution:
    """What a model with other weights and other tokens thinks."""
    tokenizer = train_tokenizer(PROMPTS, 270)
    spec = ModelSpec(
        architecture="gpt_neox", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    wanted: Any = WANTED | {"top_k": 4, "model_sha256": "d" * 64}
    return extract_logits(build_model(spec, 1), tokenizer, prompts, **wanted)


def test_every_row_is_what_the_model_says_after_eos_and_the_tokens_before() -> None:
    found = extracted()
    net = model(256)
    for doc, (first, last) in enumerate(pairwise(found.doc_offsets.tolist())):
        ids = [0, *encode_text(TOKENIZER, PROMPTS[doc]), 0]
        with torch.no_grad():
            logprobs = net(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1).numpy()
        assert found.token_ids[first:last].tolist() == ids[1:]
        own = logprobs[np.arange(len(ids) - 1), ids[1:]]
        assert found.own_logprob[first:last] == pytest.approx(own, abs=1e-4)
        top = np.sort(logprobs, axis=-1)[:, ::-1][:, :8]
        assert found.topk_logprobs[first:last] == pytest.approx(top, abs=1e-4)
        chosen = np.take_along_axis(logprobs, found.topk_ids[first:last].astype(np.int64), -1)
        assert chosen == pytest.approx(top, abs=1e-4)
        tail = np.log(1 - np.exp(top).sum(-1))
        assert found.tail_logprob[first:last] == pytest.approx(tail, abs=1e-4)


def test_what_is_extracted_passes_the_coordinators_check(tmp_path: Path) -> None:
    write_logits(tmp_path / "c", extracted(context=CONTEXT))
    check_logits(tmp_path / "c", prompts=PROMPTS, prompt_set_sha256="a" * 64, top_k=8)


def test_later_text_changes_no_earlier_row() -> None:
    long = extracted([PROMPTS[0] + " Also called stroke."])
    short = extracted([PROMPTS[0]])
    rows = short.header.positions - 1
    assert long.own_logprob[:rows] == pytest.approx(short.own_logprob[:rows], abs=1e-5)
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
        assert alone.own_logprob == pytest.approx(together.own_logprob[first:last], abs=1e-4)


def test_all_ids_can_be_kept_and_leave_an_empty_tail() -> None:
    found = extracted([PROMPTS[0]], top_k=len(TOKENIZER))
    assert (found.tail_logprob == -60).all()


def test_a_tokenizer_that_is_not_byte_level_is_refused() -> None:
    word = TOKENIZER.__class__(
        tokenizer_object=Tokenizer(WordLevel({"\u2581a": 1, "</s>": 0}, unk_token="</s>")),
        eos_token="</s>",
    )
    with pytest.raises(TokenizerError, match="give back"):
        extract_logits(
            model(), word, ["a"], top_k=2, prompt_set_sha256="a" * 64, model_sha256="b" * 64
        )


def test_a_tokenizer_is_named_by_what_it_does() -> None:
    assert hash_tokenizer(TOKENIZER) == hash_tokenizer(train_tokenizer(PROMPTS * 3, 300))
    assert hash_tokenizer(TOKENIZER) != hash_tokenizer(train_tokenizer(PROMPTS, 280))


# ------------------------------------------------------------------------------- to a file
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "budget": {"budget": Budget(0.3, -1.0), "pivot": pivot_of()},
    "nothing": {"budget": Budget(0.3, 1e6), "pivot": pivot_of()},
    "samples": {"sampler": "samples", "draws": 12, "seed": 5},
    "both": {
        "sampler": "samples",
        "draws": 200,
        "budget": Budget(0.5, -1.0),
        "pivot": pivot_of(),
    },
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_a_file_made_in_shards_is_the_one_made_at_once(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shards of one document: batches of one, so that no number hangs on its neighbours.
    monkeypatch.setattr(extract, "SHARD_POSITIONS", 1)
    write_logits(tmp_path / "once", extracted(context=CONTEXT, **options))
    wanted: Any = WANTED | options
    header = extract_to_file(tmp_path / "c", model(), TOKENIZER, PROMPTS, **wanted)
    assert (tmp_path / "c").read_bytes() == (tmp_path / "once").read_bytes()
    assert check_logits(tmp_path / "c", prompts=PROMPTS, prompt_set_sha256="a" * 64, top_k=8) == (
        header
    )
    assert {p.name for p in tmp_path.iterdir()} == {"c", "once"}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_where_the_shards_are_cut_changes_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Draws among it: they hang on seed, document and row, and on no batch and no shard."""
    whole = extracted(context=CONTEXT, **options)
    monkeypatch.setattr(extract, "SHARD_POSITIONS", 40)
    parts = extracted(context=CONTEXT, **options)
    assert whole.header == parts.header
    assert np.array_equal(whole.topk_ids, parts.topk_ids)
    assert whole.topk_logprobs == pytest.approx(parts.topk_logprobs, abs=1e-4)
    assert whole.own_logprob == pytest.approx(parts.own_logprob, abs=1e-4)


def test_a_budget_ships_what_beats_the_pivot_most_and_every_own_logprob() -> None:
    whole, pivot = extracted(), pivot_of()
    found = extracted(budget=Budget(0.25, 0.0), pivot=pivot)
    gain = gains(whole, pivot)
    assert 0 < found.shipped.sum() <= 0.25 * whole.header.positions
    assert gain[found.shipped].min() >= max(0, np.sort(gain)[-found.header.shipped - 1])
    assert np.array_equal(found.own_logprob, whole.own_logprob)
    assert found.header.pivot_sha256 == "d" * 64


def test_a_budget_needs_a_pivot_that_read_the_same_documents() -> None:
    for pivot in (None, pivot_of(PROMPTS[:2])):
        with pytest.raises(ValueError, match="a budget needs"):
            extracted(budget=Budget(0.5), pivot=pivot)


def test_draws_follow_the_model_and_their_seed() -> None:
    prompts = [PROMPTS[0]] * 2
    draws: dict[str, Any] = {"sampler": "samples", "draws": 255, "top_k": len(TOKENIZER)}
    one, two, dense = extracted(prompts, **draws), extracted(prompts, **draws), extracted(prompts)
    assert np.array_equal(one.topk_ids, two.topk_ids)
    assert not np.array_equal(one.topk_ids, extracted(prompts, **draws, seed=1).topk_ids)
    rows = one.header.positions // 2
    assert not np.array_equal(one.topk_ids[:rows], one.topk_ids[rows:])
    assert one.own_logprob == pytest.approx(dense.own_logprob, abs=1e-5)
    # The shares of the likeliest id, over rows and draws together: within five deviations.
    likeliest = one.topk_ids == dense.topk_ids[:, :1]
    share = np.where(likeliest, np.exp(one.topk_logprobs), 0).sum()
    p = np.exp(dense.topk_logprobs[:, 0])
    assert abs(share - p.sum()) < 5 * np.sqrt((p * (1 - p) / 255).sum())


def test_a_model_that_diverged_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    broken = model()
    broken.get_output_embeddings().weight.data[3] = torch.nan
    with pytest.raises(ContributionError) as caught:
        extract_to_file(tmp_path / "c", broken, TOKENIZER, PROMPTS, **WANTED)
    assert caught.value.code == "not_finite"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"top_k": 10_000}, {"draws": 256}, {"draws": 0}])
def test_numbers_that_cannot_be_meant_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be in"):
        extracted(**wrong)


def test_progress_reaches_the_end_once() -> None:
    told: list[tuple[int, int]] = []
    found = extracted(context=CONTEXT, on_progress=lambda *now: told.append(now))
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert told[-1] == (found.header.positions, found.header.positions)


def test_a_padded_vocabulary_has_ids_that_write_nothing(tmp_path: Path) -> None:
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(TOKENIZER) + 37
    )
    padded: Any = WANTED | {"top_k": len(TOKENIZER) + 37}
    extract_to_file(tmp_path / "c", build_model(spec, 0), TOKENIZER, PROMPTS, **padded)
    header = check_logits(
        tmp_path / "c", prompts=PROMPTS, prompt_set_sha256="a" * 64, top_k=padded["top_k"]
    )
    assert header.vocab_size == len(TOKENIZER) + 37
