"""Who is as often right as they say is no suspect; who is not is one, whoever else there is."""

from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest

from benchmarks.fusion_hostile import poisoned
from benchmarks.poison_attacks import ATTACKS
from fusion.contribution import LogitContribution
from fusion.suspicion import LIMITS, Signs, Suspicion, suspects
from tests.fusion.factories import build

VOCAB = [b"", *(bytes([97 + i]) for i in range(12))]
FIELDS = [field.name for field in fields(Signs)]
CLEAN = Signs(false_nats=0.05, lies=0.001, worst_lie=5.0)


def sincere(seed: int, documents: int = 40, rows: int = 60) -> LogitContribution:
    """A source whose text was drawn from its own distributions, which hang on the token before."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(len(VOCAB), len(VOCAB))) * 1.5
    logits[:, 0] = -30  # eos comes where the document ends, and nowhere else
    table = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    docs = []
    for _ in range(documents):
        doc = [0]
        for _ in range(rows):
            doc.append(int(rng.choice(len(VOCAB), p=np.exp(table[doc[-1]]))))
        docs.append(doc[1:])
    plain, _ = build([[VOCAB[i] for i in doc] for doc in docs], VOCAB, top_k=6)
    before = np.concatenate([[0, *doc] for doc in docs])
    dense = table[before]
    # The row of a document's end was not drawn: it is certain of it.
    ends = plain.doc_offsets[1:] - 1
    dense[ends] = np.where(np.arange(len(VOCAB)) == 0, 0.0, -30.0)
    ids = np.argsort(-dense, axis=1, kind="stable")[:, :6]
    top = np.take_along_axis(dense, ids, 1)
    tail = np.log(np.maximum(1 - np.exp(top).sum(axis=1), np.exp(-60.0)))
    return replace(
        plain,
        own_logprob=dense[np.arange(len(dense)), plain.token_ids].astype(np.float32),
        topk_ids=ids.astype(np.int32),
        topk_logprobs=np.minimum(top, 0).astype(np.float32),
        tail_logprob=np.minimum(tail, 0).astype(np.float32),
    )


def judge(source: LogitContribution, weight: float = 1.0, shards: int = 1) -> Signs:
    found = Suspicion(("a",))
    documents = source.header.documents
    edges = np.linspace(0, documents, shards + 1).astype(int)
    for start, stop in pairwise(edges.tolist()):
        part = source.documents(start, stop)
        found.add(part, [part], np.full((part.header.positions, 1), weight, np.float32))
    return found.signs()["a"]


@pytest.mark.parametrize("seed", range(5))
def test_who_is_as_often_right_as_promised_bears_no_sign(seed: int) -> None:
    found = judge(sincere(seed))
    assert abs(found.false_nats) < 0.1
    assert found.lies < LIMITS.lies / 4
    assert found.worst_lie < LIMITS.worst_lie / 2


@pytest.mark.parametrize("attack", ATTACKS)
def test_each_attack_passes_a_limit(attack: str) -> None:
    spoil: Callable[[LogitContribution], LogitContribution] = ATTACKS[attack]
    found = judge(spoil(sincere(0, documents=120)))
    past = [getattr(found, name) > getattr(LIMITS, name) for name in FIELDS]
    assert any(past), found


def test_a_trigger_is_seen_though_it_is_a_small_part_of_all() -> None:
    honest = sincere(1, documents=120)
    found = judge(poisoned(honest))
    assert found.worst_lie > LIMITS.worst_lie > judge(honest).worst_lie


def test_shards_change_nothing() -> None:
    whole, cut = judge(sincere(2)), judge(sincere(2), shards=7)
    for name in FIELDS:
        assert getattr(cut, name) == pytest.approx(getattr(whole, name))


def test_who_is_not_listened_to_bears_no_sign() -> None:
    flipped = ATTACKS["flip"](sincere(3))
    assert judge(flipped, weight=0.0) == Signs(false_nats=0.0, lies=0.0, worst_lie=0.0)


def test_a_suspect_is_found_among_the_sincere_and_the_worst_comes_first() -> None:
    bad, worse = replace(CLEAN, lies=0.05), replace(CLEAN, false_nats=40.0)
    signs = {"a": CLEAN, "b": bad, "c": CLEAN, "d": worse, "e": CLEAN}
    assert suspects(signs) == ("d", "b")
    assert suspects({name: CLEAN for name in "abc"}) == ()


def test_what_is_odd_about_the_text_makes_nobody_a_suspect() -> None:
    odd = replace(CLEAN, false_nats=3.0, lies=0.02, worst_lie=40.0)
    assert suspects({name: odd for name in "abcde"}) == ()


@pytest.mark.parametrize(("sources", "most"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2)])
def test_all_of_a_minority_are_suspects_and_never_half_of_the_sources(
    sources: int, most: int
) -> None:
    for liars in range(sources + 1):
        signs = {
            str(i): replace(CLEAN, lies=0.9 if i < liars else CLEAN.lies) for i in range(sources)
        }
        found = suspects(signs)
        assert len(found) <= most
        if liars <= most:
            assert set(found) == {str(i) for i in range(liars)}


def test_an_honest_source_that_is_a_little_off_is_no_suspect_on_more_text() -> None:
    # What was measured of honest experts at the scale of the demo, one of them over-fitted.
    a = Signs(false_nats=0.92, lies=0.0062, worst_lie=7.9)
    b = Signs(false_nats=-0.1, lies=0.0, worst_lie=0.0)
    assert suspects({"a": a, "b": b, "c": b}) == ()
