"""Preference fusion: laws of loss and reference, files, and a pivot that changes sides."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fp8.train import TrainConfig, causal_lm_loss, packed_batches, train
from fusion.byte_tables import byte_table
from fusion.models import ModelSpec, build_model, encode_documents, encode_text, train_tokenizer
from fusion.pair_file import PreferenceError, PreferencePair
from fusion.pair_scores import (
    LEAST,
    PairScores,
    hash_pairs,
    read_scores,
    rewrite_scores,
    write_scores,
)
from fusion.pair_scoring import score_pairs
from fusion.preference import (
    Pairs,
    PreferenceSettings,
    _prepare,
    fuse_preferences,
    preference_loss,
)
from tests.fusion import families

FACTS = [("A10", "heart"), ("B22", "bone"), ("C35", "lung"), ("D47", "skin")]
DOCS = [f"Code {code} is of the {organ}." for code, organ in FACTS]
ORGANS = [organ for _, organ in FACTS]
TOKENIZER = train_tokenizer(DOCS * 5, 280)
OTHER_TOKENIZER = train_tokenizer(DOCS * 5, 340)
PAIRS = [
    PreferencePair(f"Code {code} is", f" of the {organ}.", f" of the {ORGANS[i - 1]}.")
    for i, (code, organ) in enumerate(FACTS)
]
SHA = "a" * 64
LOGS = st.floats(-50, 0)


def model(tokenizer: PreTrainedTokenizerFast = TOKENIZER, seed: int = 0) -> PreTrainedModel:
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    return build_model(spec, seed)


def config(steps: int, **changed: Any) -> TrainConfig:
    return TrainConfig(steps=steps, lr=3e-3, warmup_steps=2, decay_steps=2, **changed)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def loss(chosen: float, rejected: float, fused: tuple[float, float], **more: float) -> float:
    one = numbers(1.0)
    arguments = {"beta": 2.5} | more
    return float(
        preference_loss(
            numbers(chosen), numbers(rejected), one, one, *map(numbers, fused), **arguments
        )
    )


@given(LOGS, LOGS, st.floats(0.01, 10))
def test_a_policy_that_is_the_reference_pays_log_2(chosen: float, no: float, beta: float) -> None:
    assert loss(chosen, no, (chosen, no), beta=beta) == pytest.approx(math.log(2))


@given(LOGS, LOGS, LOGS, LOGS, st.floats(0.1, 5), st.floats(0.1, 5))
def test_the_loss_falls_with_the_margin_and_rises_with_the_offset(
    chosen: float, no: float, fused: float, fused_no: float, step: float, beta: float
) -> None:
    here = loss(chosen, no, (fused, fused_no), beta=beta)
    assert loss(chosen + step, no, (fused, fused_no), beta=beta) <= here
    assert loss(chosen, no + step, (fused, fused_no), beta=beta) >= here
    assert loss(chosen, no, (fused, fused_no), beta=beta, offset=step) >= here
    assert loss(chosen, no, (fused + step, fused_no), beta=beta) >= here
    margin = chosen - fused - no + fused_no
    sharper = loss(chosen, no, (fused, fused_no), beta=beta + step)
    assert sharper <= here + 1e-12 if margin >= 0 else sharper >= here - 1e-12
    wanted = np.logaddexp(0, -beta * margin)
    assert here == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_the_gradient_is_that_of_finite_differences_and_goes_to_the_policy_only() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = -torch.rand(2, 5, generator=generator, dtype=torch.float64) * 9
    lengths = numbers(1, 2, 3, 4, 5)
    fused = (policy * 0.1 + 0.1).requires_grad_()
    policy.requires_grad_()

    def of_policy(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_loss(chosen, rejected, lengths, lengths + 1, fused[0], fused[1], 1.3, 0.4)

    assert torch.autograd.gradcheck(of_policy, (policy[0], policy[1]))
    of_policy(policy[0], policy[1]).sum().backward()
    assert policy.grad is not None
    assert (policy.grad[0] < 0).all()
    assert (policy.grad[1] > 0).all()
    assert fused.grad is None


def nats(net: PreTrainedModel, prompt: list[int], response: list[int]) -> float:
    ids = [0, *prompt, *response, 0]
    with torch.no_grad():
        logprobs = net(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[i]]) for i in range(1 + len(prompt), len(ids)))


@pytest.mark.parametrize("tokenizer", [TOKENIZER, OTHER_TOKENIZER])
def test_a_score_is_the_log_probability_of_the_response_and_its_end(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    net = model(tokenizer)
    pairs = [*PAIRS, PreferencePair("", "Code", ""), PreferencePair("Code " * 300, "A10", "B")]
    scores = score_pairs(net, tokenizer, pairs)
    for i, pair in enumerate(pairs[:-1]):
        prompt = encode_text(tokenizer, pair.prompt)
        for text, logp, tokens in (
            (pair.chosen, scores.chosen_logp[i], scores.chosen_tokens[i]),
            (pair.rejected, scores.rejected_logp[i], scores.rejected_tokens[i]),
        ):
            response = encode_text(tokenizer, text)
            assert tokens == len(response) + 1
            assert logp == pytest.approx(nats(net, prompt, response), rel=1e-5)
    # A prompt longer than the context: the response is scored behind the prompt's end.
    assert scores.chosen_tokens[-1] == len(encode_text(tokenizer, "A10")) + 1
    assert 0 > scores.chosen_logp[-1] > -20 * scores.chosen_tokens[-1]


def test_a_response_is_read_as_the_middle_of_its_document() -> None:
    tokenizer = families.llama()
    pairs = [PreferencePair("Code", " is", "s is"), PreferencePair("", "Code", " Code")]
    scores = score_pairs(model(tokenizer), tokenizer, pairs)
    whole = byte_table(tokenizer, len(tokenizer)).prefix
    assert whole == b" "
    for tokens, pair, text in (
        (scores.chosen_tokens[0], pairs[0], " is"),
        (scores.rejected_tokens[0], pairs[0], "s is"),
        (scores.chosen_tokens[1], pairs[1], "Code"),
        (scores.rejected_tokens[1], pairs[1], " Code"),
    ):
        wanted = encode_text(tokenizer, text, prefixed=not pair.prompt)
        assert tokens == len(wanted) + 1
    net, prompt = model(tokenizer), encode_text(tokenizer, "Code")
    eos = tokenizer.eos_token_id
    ids = [eos, *prompt, *encode_text(tokenizer, "s is", prefixed=False), eos]
    with torch.no_grad():
        logprobs = net(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    wanted_logp = sum(float(logprobs[i - 1, ids[i]]) for i in range(1 + len(prompt), len(ids)))
    assert scores.rejected_logp[0] == pytest.approx(wanted_logp, rel=1e-5)


def retokenised(scores: PairScores, factor: int) -> PairScores:
    """The same text at the same probability, cut into `factor` times as many tokens."""
    return replace(
        scores,
        chosen_tokens=scores.chosen_tokens * factor,
        rejected_tokens=scores.rejected_tokens * factor,
    )


def reference(length: str, scores: dict[str, PairScores]) -> Tensor:
    wanted: Any = {"length": length}
    how = PreferenceSettings(train=config(1), batch_size=1, **wanted)
    return _prepare(model(), TOKENIZER, PAIRS, scores, how).reference


@pytest.mark.parametrize("length", ["pivot", "none"])
def test_how_an_expert_cuts_a_text_of_equal_probability_changes_nothing(length: str) -> None:
    expert = score_pairs(model(seed=1), TOKENIZER, PAIRS)
    one, two = (reference(length, {"a": s}) for s in (expert, retokenised(expert, 3)))
    assert torch.equal(one, two)
    assert not torch.equal(one, reference(length, {}))


def test_with_its_own_length_a_model_is_judged_by_its_quality_per_token() -> None:
    base = score_pairs(model(), TOKENIZER, PAIRS)
    finer = PairScores(
        base.chosen_logp * 3,
        base.chosen_tokens * 3,
        base.rejected_logp * 3,
        base.rejected_tokens * 3,
    )
    plain = reference("own", {})
    assert torch.allclose(reference("own", {"a": finer}), plain, atol=1e-12)
    # The price: the same text at the same probability passes for a better model when cut finer.
    assert (reference("own", {"a": retokenised(base, 3)})[0] > plain[0] + 0.1).all()


def test_a_run_starts_at_log_2_without_experts_and_higher_with_any() -> None:
    for scores in ({}, {"a": score_pairs(model(seed=1), TOKENIZER, PAIRS)}):
        for length in ("pivot", "own", "none"):
            wanted: Any = {"length": length}
            how = PreferenceSettings(train=config(1), batch_size=len(PAIRS), beta=0.5, **wanted)
            result = fuse_preferences(model(), TOKENIZER, PAIRS, scores, how)
            if scores:
                assert result.losses[0] > math.log(2) + 1e-4
            else:
                assert result.losses[0] == pytest.approx(math.log(2), abs=1e-4)


def prefers_right(net: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[bool]:
    scores = score_pairs(net, tokenizer, PAIRS)
    return [bool(b) for b in scores.chosen_logp > scores.rejected_logp]


def test_the_pivot_comes_to_prefer_what_only_the_expert_knows() -> None:
    expert = model(OTHER_TOKENIZER, 1)
    stream = encode_documents(OTHER_TOKENIZER, DOCS * 10)
    batch_at = packed_batches(stream, batch_size=8, seq_len=40, seed=0)
    train(expert, batch_at, causal_lm_loss, config(60))
    assert prefers_right(expert, OTHER_TOKENIZER) == [True] * 4
    pivot = model()
    known = prefers_right(pivot, TOKENIZER)
    assert not all(known)
    # Responses are shown in the order that the pivot likes: the pairs themselves say nothing.
    shown = [
        pair if right else PreferencePair(pair.prompt, pair.rejected, pair.chosen)
        for pair, right in zip(PAIRS, known, strict=True)
    ]
    scores = {"expert": score_pairs(expert, OTHER_TOKENIZER, shown)}
    how = PreferenceSettings(train=config(30), batch_size=2, judge="experts")
    result = fuse_preferences(pivot, TOKENIZER, shown, scores, how)
    assert prefers_right(pivot, TOKENIZER) == [True] * 4
    assert result.losses[-1] < result.losses[0]
    stubborn = model()
    fuse_preferences(stubborn, TOKENIZER, shown, scores, replace(how, judge="given"))
    assert prefers_right(stubborn, TOKENIZER) == known


def test_a_liar_among_three_who_know_does_not_turn_the_pivot() -> None:
    """Although the sources are the judges, and it claims as much as a file may hold."""
    base = score_pairs(model(), TOKENIZER, PAIRS)
    yes, no = base.chosen_tokens, base.rejected_tokens
    sources = {
        name: PairScores(base.chosen_logp + nats * yes, yes, base.rejected_logp - nats * no, no)
        for name, nats in (("a", 0.4), ("b", 0.5), ("c", 0.6))
    }
    sources["liar"] = PairScores(LEAST * yes, yes, 0.0 * no, no)
    pivot = model()
    how = PreferenceSettings(train=config(20), batch_size=4, judge="experts")
    fuse_preferences(pivot, TOKENIZER, PAIRS, sources, how)
    assert prefers_right(pivot, TOKENIZER) == [True] * 4


def test_pieces_of_a_batch_train_as_the_whole_and_a_resumed_run_as_one(tmp_path: Path) -> None:
    pivot, scores = model(), {"a": score_pairs(model(seed=1), TOKENIZER, PAIRS)}

    def run(steps: int, where: Path | None = None, **changed: Any) -> list[float]:
        how = PreferenceSettings(train=config(steps, **changed), batch_size=3)
        net = model()
        net.load_state_dict(pivot.state_dict())
        return fuse_preferences(net, TOKENIZER, PAIRS, scores, how, checkpoint_dir=where).losses

    whole = run(6)
    assert run(6, accumulate=2) == pytest.approx(whole, rel=1e-4)
    stop = iter([False, False, False, True])
    how = PreferenceSettings(train=config(6), batch_size=3)
    fuse_preferences(
        model(),
        TOKENIZER,
        PAIRS,
        scores,
        how,
        checkpoint_dir=tmp_path,
        should_stop=lambda: next(stop),
    )
    assert run(6, tmp_path) == whole


def test_in_fp8_it_learns_as_well_and_the_layers_are_plain_again_after_it() -> None:
    scores = {"a": score_pairs(model(seed=1), TOKENIZER, PAIRS)}
    how = PreferenceSettings(train=config(4), batch_size=4)
    plain, quantised = model(), model()
    wanted = fuse_preferences(plain, TOKENIZER, PAIRS, scores, how).losses
    base = score_pairs(quantised, TOKENIZER, PAIRS)
    fp8 = replace(how, fp8=True)
    found = fuse_preferences(quantised, TOKENIZER, PAIRS, scores, fp8, base=base).losses
    assert found != wanted
    assert found == pytest.approx(wanted, rel=0.2)
    assert [type(m) for m in quantised.modules()] == [type(m) for m in plain.modules()]


def test_every_pair_is_seen_once_before_any_is_seen_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def fake(_pivot: Any, batch_at: Any, *_: Any, **__: Any) -> None:
        for step in range(8):
            batch = batch_at(step)
            assert torch.equal(batch.index, batch_at(step).index)
            assert len(batch.index) == batch.tokens == 3
            seen.extend(batch.index.tolist())

    monkeypatch.setattr("fusion.preference.train", fake)
    how = PreferenceSettings(train=config(8), batch_size=3)
    fuse_preferences(model(), TOKENIZER, PAIRS, {}, how)
    epochs = [seen[at : at + 4] for at in range(0, 24, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 1


def test_a_batch_too_small_to_cut_and_settings_that_cannot_be_meant_are_refused() -> None:
    with pytest.raises(ValueError, match="raise batch_size"):
        Pairs(torch.tensor([1])).part(0, 2)
    for changed in ({"beta": 0.0}, {"offset": -1.0}, {"batch_size": 0}, {"beta": math.nan}):
        with pytest.raises(ValueError, match="must be"):
            PreferenceSettings(**({"train": config(1), "batch_size": 1} | changed))


def test_pairs_and_scores_that_do_not_fit_are_refused() -> None:
    how = PreferenceSettings(train=config(1), batch_size=1)
    with pytest.raises(PreferenceError, match="no pairs"):
        score_pairs(model(), TOKENIZER, [])
    scores = {"a": score_pairs(model(), TOKENIZER, PAIRS)}
    with pytest.raises(PreferenceError, match=r"a scored 4 pairs; wanted 3"):
        fuse_preferences(model(), TOKENIZER, PAIRS[:3], scores, how)
    long = PreferencePair("x" * 300, "a", "b")
    with pytest.raises(PreferenceError, match=r"pair 1 has 302 tokens .* at most 256"):
        fuse_preferences(model(), TOKENIZER, [PAIRS[0], long], {}, how)


def made_up(rows: Sequence[tuple[float, int]]) -> PairScores:
    logp = np.asarray([row[0] for row in rows], np.float64)
    tokens = np.asarray([row[1] for row in rows], np.int64)
    return PairScores(logp, tokens, logp[::-1].copy(), tokens[::-1].copy())


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(-10_000, 0), st.integers(1, 5)), min_size=1, max_size=5))
def test_scores_come_out_of_their_file_as_they_went_in(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int]]
) -> None:
    """But for what is finer than a hundredth of a nat, which does not leave."""
    path = tmp_path_factory.mktemp("scores") / "scores.json"
    pairs = [PreferencePair(str(i), "a", "b\u2603") for i in range(len(rows))]
    wanted = made_up([(hundredths / 100, tokens) for hundredths, tokens in rows])
    write_scores(path, wanted, pairs, model_sha256=SHA)
    told = path.read_bytes()
    finer = made_up([(min(0, hundredths + 0.3) / 100, n) for hundredths, n in rows])
    write_scores(path, finer, pairs, model_sha256=SHA)
    assert path.read_bytes() == told
    write_scores(path, wanted, pairs, model_sha256=SHA)
    found = read_scores(path, pairs)
    for name in ("chosen_logp", "chosen_tokens", "rejected_logp", "rejected_tokens"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name))
        assert getattr(found, name).dtype == getattr(wanted, name).dtype


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("chosen_logp", "[-1.0]", "wanted 4 of each"),
        ("chosen_logp", "[-1,-1,-1,0.5]", "chosen_logp.3"),
        ("chosen_logp", "[-1,-1,-1,NaN]", "finite|NaN"),
        ("rejected_logp", "[-1,-1,-1,-1e999]", "finite"),
        ("rejected_logp", '[-1,-1,-1,"-1"]', "rejected_logp.3"),
        ("chosen_tokens", "[1,1,1,0]", "chosen_tokens.3"),
        (
            "rejected_logp",
            "[-1,-1,-100.5,-1]",
            "rejected of pair 2: found -100.5 nats for 1 tokens",
        ),
        ("chosen_tokens", "[1,1,99,1]", "chosen of pair 2: .* wanted at most 17 tokens"),
        ("chosen_tokens", "[1,1,1,true]", "chosen_tokens.3"),
        ("rejected_tokens", "[1,1,1,1.5]", "rejected_tokens.3"),
        ("rejected_tokens", "[1,1,1,1" + "0" * 40 + "]", "rejected_tokens.3"),
        ("pairs_sha256", f'"{"b" * 64}"', "scores the pairs bbbb"),
        ("pairs_sha256", '"b"', "pairs_sha256"),
        ("model_sha256", f'"{"A" * 64}"', "model_sha256"),
        ("format", '"cofuse-pair-scores-2"', "format"),
        ("more", "1", "more"),
        ("chosen_logp", "[" * 500, "JSON"),
        ("chosen_logp", "[" + "0," * 2000 + "0]", "have at most"),
    ],
)
def test_a_file_of_scores_is_checked_to_the_last_number(
    field: str, value: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "scores.json"
    write_scores(path, made_up([(-1.0, 1)] * 4), PAIRS, model_sha256=SHA)
    content = {name: json.dumps(v) for name, v in json.loads(path.read_text()).items()}
    content[field] = value
    path.write_text("{" + ",".join(f'"{name}":{v}' for name, v in content.items()) + "}")
    with pytest.raises(PreferenceError, match=says):
        read_scores(path, PAIRS)


def test_a_draft_is_written_anew_only_if_it_is_of_the_model_and_the_tokens_asked_for(
    tmp_path: Path,
) -> None:
    draft, out = tmp_path / "draft", tmp_path / "out"
    write_scores(draft, made_up([(-1.0, 1)] * 4), PAIRS, model_sha256=SHA)
    content = json.loads(draft.read_text())
    content["chosen_logp"] = [-1.001234567, -0.0, -1, -1]  # what hides in digits and in signs
    draft.write_text(json.dumps(dict(reversed(content.items())), indent=3))
    asked: dict[str, Any] = {"model_sha256": SHA, "tokens": [(1, 1)] * 4}
    rewrite_scores(draft, out, PAIRS, **asked)
    assert "0012" not in out.read_text()
    assert "-0.0" not in out.read_text()
    assert read_scores(out, PAIRS).chosen_logp.tolist() == [-1.0, 0.0, -1.0, -1.0]
    for change, says in (
        ({"model_sha256": "b" * 64}, "another model"),
        ({"tokens": [(1, 1)] * 3 + [(1, 2)]}, "other tokens"),
    ):
        with pytest.raises(PreferenceError, match=says):
            rewrite_scores(draft, out, PAIRS, **{**asked, **change})


def test_scores_are_of_these_pairs_in_this_order_and_bad_ones_are_not_written(
    tmp_path: Path,
) -> None:
    assert hash_pairs(PAIRS) == hash_pairs(list(PAIRS))
    others = [
        PAIRS[::-1],
        PAIRS[:3],
        [PreferencePair("Code A10 i", "s of the heart.", PAIRS[0].rejected), *PAIRS[1:]],
        [PreferencePair(PAIRS[0].prompt, PAIRS[0].rejected, PAIRS[0].chosen), *PAIRS[1:]],
    ]
    assert len({hash_pairs(pairs) for pairs in [PAIRS, *others]}) == 5
    path = tmp_path / "scores.json"
    for bad in ([(math.nan, 1)], [(0.1, 1)], [(-1.0, 0)], [(-1.0, 1)] * 2):
        with pytest.raises(PreferenceError, match=r"scores\.json"):
            write_scores(path, made_up(bad), PAIRS[:1], model_sha256=SHA)
        assert not path.exists()
