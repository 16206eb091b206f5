from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

from fusion import scoring
from fusion.models import LOADING, ModelSpec, build_model
from fusion.scoring import PADDING, Window, batches, halves, score, score_streams

VOCAB = 40
STREAMS: Sequence[Sequence[int]] = [[0, *range(1, n)] for n in (2, 3, 9, 30)]


def llama() -> PreTrainedModel:
    spec = ModelSpec(
        architecture="llama", hidden_size=16, layers=1, heads=2, vocab_size=VOCAB, context=12
    )
    return build_model(spec, 0)


def scaled() -> PreTrainedModel:
    """A model that divides what its head says by 3."""
    config = GraniteConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        logits_scaling=3.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=None,
    )
    with LOADING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GraniteForCausalLM(config).float()


def rows_of(model: PreTrainedModel) -> dict[tuple[int, int], torch.Tensor]:
    """Log-probabilities by stream and row; no row may come twice."""
    found: dict[tuple[int, int], torch.Tensor] = {}
    for stream, start, logprobs, labels in score_streams(model, STREAMS):
        assert labels.tolist() == list(STREAMS[stream][start + 1 : start + 1 + len(labels)])
        for at, row in enumerate(logprobs):
            assert (stream, start + at) not in found
            found[stream, start + at] = row
    assert set(found) == {(s, r) for s, ids in enumerate(STREAMS) for r in range(len(ids) - 1)}
    return found


@pytest.mark.parametrize("make", [llama, scaled])
def test_every_row_is_the_whole_models_word_however_few_logits_are_held(
    make: Callable[[], PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    at_once = rows_of(model)
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 3 * VOCAB)
    in_turns = rows_of(model)
    with torch.no_grad():
        wanted = model(torch.tensor([STREAMS[2][:-1]])).logits[0].log_softmax(-1)
    for key, row in at_once.items():
        assert torch.allclose(row, in_turns[key], atol=1e-5)
        if key[0] == 2:
            assert torch.allclose(row, wanted[key[1]], atol=1e-5)


def test_a_head_is_asked_alone_only_where_its_word_is_the_models() -> None:
    assert halves(llama()) is not None
    assert halves(scaled()) is None


def test_no_more_logits_are_held_than_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 3 * VOCAB)
    assert max(len(s.logits) for s in score(llama(), STREAMS)) == 3


def test_a_model_is_left_as_it_was_found_also_when_nobody_reads_on() -> None:
    model = llama().train()
    for _ in score(model, STREAMS):
        assert not model.training
        assert not torch.is_inference_mode_enabled()
        break
    assert model.training


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 200))
def test_a_batch_holds_what_it_may_and_little_padding(lengths: list[int], tokens: int) -> None:
    windows = [Window(n, [0] * length, length, 0) for n, length in enumerate(lengths)]
    found = list(batches(windows, tokens))
    assert sorted(w.stream for batch in found for w in batch) == list(range(len(lengths)))
    for batch in found:
        padded = len(batch) * max(len(w.ids) for w in batch)
        assert padded <= tokens or len(batch) == 1
        assert padded - sum(len(w.ids) for w in batch) <= PADDING * padded
