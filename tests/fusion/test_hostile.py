"""Sources that are broken, random or hostile: refused by name, or kept to their share."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.fusion_hostile import KINDS, poison_of
from fusion.codec import check_logits, write_logits
from fusion.contribution import LogitContribution, LogitSource
from fusion.credit import ALL
from fusion.evaluate import bits_per_byte
from fusion.prepare import prepare
from fusion.routing import EVEN_SHARES, most_of_all, scale_experts, share_factors
from fusion.settings import FusionSettings
from fusion.unified import fuse
from tests.fusion.test_unified import PROMPTS, SETTINGS, TRAIN, both, contribution, pivot, tokenizer

HOSTILE = {name: make for name, make in KINDS.items() if make is not None}


def shares(
    folder: Path, sources: Mapping[str, LogitSource], settings: FusionSettings = SETTINGS
) -> dict[str, float]:
    made = prepare(pivot(), tokenizer(300), PROMPTS, sources, settings, folder)
    assert made.routing is not None
    return made.routing.shares()[ALL]


def claims(source: LogitContribution, own_logprob: float) -> LogitContribution:
    return replace(source, own_logprob=np.full_like(source.own_logprob, own_logprob))


# ---------------------------------------------------------------------------- what passes the check
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_may_be_sound_to_the_last_value(tmp_path: Path, kind: str) -> None:
    """So that what keeps it harmless is not the codec, but the routing and the caps."""
    write_logits(tmp_path / "c", HOSTILE[kind](contribution("a")))
    check_logits(tmp_path / "c", prompts=PROMPTS, prompt_set_sha256="a" * 64, top_k=16)


@pytest.mark.parametrize("kind", HOSTILE)
def test_no_hostile_source_has_more_than_its_share(tmp_path: Path, kind: str) -> None:
    sources = both() | {"c": HOSTILE[kind](contribution("a"))}
    found = shares(tmp_path, sources)
    assert found["c"] <= EVEN_SHARES / 3 + 1e-3
    assert sum(found.values()) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["random", "permuted"])
def test_who_reads_badly_is_hardly_heard(tmp_path: Path, kind: str) -> None:
    sources = both() | {"c": HOSTILE[kind](contribution("a"))}
    even = len(PROMPTS) / contribution("a").header.positions  # a document's first row is a guess
    assert shares(tmp_path, sources)["c"] < even


def test_a_liar_does_not_hide_another(tmp_path: Path) -> None:
    """Two claim all: scaled down alone, the first would leave its share to the second."""
    liars = {"c": claims(contribution("a"), 0.0), "d": claims(contribution("b"), -0.01)}
    found = shares(tmp_path, both() | liars, replace(SETTINGS, max_share=0.2))
    assert all(found[name] <= 0.2 + 1e-3 for name in "abcd")
    assert found["c"] == pytest.approx(0.2, abs=1e-3)
    assert found["d"] == pytest.approx(0.2, abs=1e-3)
    assert sum(found.values()) == pytest.approx(1)


def test_what_a_liar_loses_goes_to_whom_the_others_evidence_favours() -> None:
    """However sure of itself the liar was: odds of 1e-16 to 1e-12 are still 1 to 10 000."""
    weights = np.asarray([[1e-16, 1e-12, 0.0, 1.0]], np.float32)
    found = scale_experts(weights, share_factors(weights.mean(axis=0).astype(float), 0.4))
    assert found[0, 3] == pytest.approx(0.4)
    assert found[0, 1] == pytest.approx(0.6, rel=1e-3)
    alone = np.asarray([[0.0, 0.0, 0.0, 1.0]], np.float32)
    assert scale_experts(alone, np.asarray([9.0, 9.0, 0.4]))[0].tolist() == pytest.approx(
        [0.6, 0, 0, 0.4]
    )


@pytest.mark.parametrize("sources", [1, 2, 3, 10])
def test_the_default_cap_is_for_those_who_speak_for_themselves(sources: int) -> None:
    assert most_of_all(SETTINGS, sources) == min(1.0, EVEN_SHARES / sources)
    assert most_of_all(replace(SETTINGS, max_share=0.9), sources) == 0.9
    # An operator's own weights are no source's claim.
    assert most_of_all(replace(SETTINGS, routing="static"), sources) == 1.0
    assert most_of_all(replace(SETTINGS, routing="uniform"), sources) == 1.0


def test_the_poison_is_wrong_wherever_it_is_put() -> None:
    honest = contribution("a")
    rows, wrong = poison_of(honest)
    found = HOSTILE["poisoned"](honest)
    assert len(rows) > 0
    assert (found.topk_ids[rows, 0] == wrong).all()
    assert (honest.token_ids[rows] != wrong).all()
    others = np.delete(np.arange(honest.header.positions), rows)
    assert np.array_equal(found.topk_ids[others], honest.topk_ids[others])


# ----------------------------------------------------------------------------- what is refused
def broken(field: str, value: float) -> LogitContribution:
    values = getattr(contribution("b"), field).copy()
    values[3] = value
    return replace(contribution("b"), **{field: values})


@pytest.mark.parametrize("field", ["own_logprob", "topk_logprobs", "tail_logprob"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused_with_field_and_source(
    tmp_path: Path, field: str, value: float
) -> None:
    says = f"{field} of odd holds NaN or infinity: its model diverged; train it again"
    with pytest.raises(ValueError, match=says):
        shares(tmp_path, {"a": contribution("a"), "odd": broken(field, value)})


@pytest.mark.parametrize("loss", ["span_kl", "infifusion", "minced"])
def test_documents_of_another_text_are_refused_though_the_hash_is_right(
    tmp_path: Path, loss: Any
) -> None:
    settings = replace(SETTINGS, loss=loss)
    few = contribution("b").documents(0, 19)
    says = "odd holds 19 documents, the prompt set 20; extract its logits from this prompt set"
    with pytest.raises(ValueError, match=says):
        prepare(pivot(), tokenizer(300), PROMPTS, {"odd": few}, settings, tmp_path / "few")
    longer = [*PROMPTS[:-1], PROMPTS[-1] + " More."]
    odd = {"odd": contribution("b")}
    says = r"odd read 880 bytes of 20 documents that have 886, .* from this prompt set"
    with pytest.raises(ValueError, match=says):
        prepare(pivot(), tokenizer(300), longer, odd, settings, tmp_path / "longer")


def test_nothing_is_left_that_could_pass_for_targets(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="NaN"):
        shares(tmp_path, {"odd": broken("own_logprob", np.nan)})
    assert not (tmp_path / "targets.json").exists()
    shares(tmp_path, both())  # the same folder, once the source is left out


def test_a_vocabulary_padded_with_ids_that_write_nothing_changes_no_target(tmp_path: Path) -> None:
    plain = contribution("a")
    size = plain.header.vocab_size + 7
    padded = replace(
        plain,
        header=replace(plain.header, vocab_size=size),
        vocab_offsets=np.append(plain.vocab_offsets, [plain.vocab_offsets[-1]] * 7),
    )
    for name, source in (("plain", plain), ("padded", padded)):
        shares(tmp_path / name, {"a": source})
    for file in sorted((tmp_path / "plain").glob("*.npy")):
        assert np.array_equal(np.load(file), np.load(tmp_path / "padded" / file.name)), file.name


# --------------------------------------------------------------------------------- what it costs
@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_the_pivot_is_at_most_two_percent_worse_with_a_hostile_source(kind: str) -> None:
    """At the size of a test; benchmarks/fusion_hostile.py measures it on real text."""
    settings = replace(SETTINGS, train=replace(TRAIN, steps=60, decay_steps=20), batch_size=8)
    heldout = [f"Code I{n} is infarction of part {n}, right side." for n in range(20, 40)]

    def fused(sources: Mapping[str, LogitSource]) -> float:
        net = pivot()
        fuse(net, tokenizer(300), PROMPTS, sources, settings)
        return bits_per_byte(net, tokenizer(300), heldout)

    without = fused(both())
    assert fused(both() | {"c": HOSTILE[kind](contribution("a"))}) < 1.02 * without
