"""Targets of the baselines, from contributions made by hand."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8.train import TrainConfig
from fusion.baselines import (
    BASELINES,
    SHARED,
    gold_targets,
    minced_targets,
    projection_shared,
    projection_targets,
    rank_targets,
    uld_targets,
)
from fusion.contribution import LogitContribution
from fusion.dtw import edit_distances, one_to_one, warping_path
from fusion.losses import features, standardize
from fusion.methods import OBJECTIVES
from fusion.objective import FusionBatch, fusion_loss
from fusion.settings import FusionSettings
from tests.fusion.factories import build, vocabulary_of

MINE = [[b"the", b" heart", b" beats"], [b"lungs"], [b"a", b"b", b"c"]]
SAME = MINE
OTHER = [[b"the", b" he", b"art", b" beats"], [b"lun", b"gs"], [b"ab", b"c"]]
TOP = 4


def make(
    cuts: Sequence[Sequence[bytes]] = MINE, seed: int = 0, top_k: int = TOP
) -> LogitContribution:
    return build(cuts, vocabulary_of(MINE, OTHER), top_k=top_k, seed=seed)[0]


def unshipped(contribution: LogitContribution, row: int) -> LogitContribution:
    """Without the row's ids, as a budget leaves it."""
    ids = contribution.topk_ids.copy()
    ids[row] = -1
    floor = np.where(ids < 0, np.float32(-60), contribution.topk_logprobs)
    return replace(contribution, topk_ids=ids, topk_logprobs=floor)


# -- by index


def test_ranks_are_paired_by_index_within_a_document_and_cut_at_the_shorter() -> None:
    found = rank_targets(make(), [make(OTHER, 1), make(seed=2)])
    assert found["rank_mask"][:, 1].all()
    assert found["rank_mask"][:, 0].tolist() == [True] * 4 + [True] * 2 + [True] * 3 + [False]
    # Student row 3 is eos, and is compared with what the expert says of " beats": the fault kept.
    top = torch.from_numpy(make(OTHER, 1).topk_logprobs[3])
    np.testing.assert_allclose(
        found["rank_probs"][3, 0], standardize(top[None]).softmax(-1)[0], rtol=1e-5
    )
    np.testing.assert_allclose(
        features(torch.from_numpy(found["rank_probs"][3, 0])), standardize(top[None])[0], atol=1e-4
    )


def test_uld_has_all_of_the_experts_mass() -> None:
    expert = make(OTHER, 1)
    found = uld_targets(make(), [expert])
    there = found["uld_size"][:, 0] > 0
    assert (found["uld_size"][there] == expert.header.vocab_size).all()
    total = found["uld_probs"].sum(-1) + found["uld_each"] * (expert.header.vocab_size - TOP)
    np.testing.assert_allclose(total[there], 1, rtol=1e-5)
    assert not total[~there].any()


@pytest.mark.parametrize("loss", sorted(BASELINES))
def test_rows_that_are_not_shipped_are_not_compared(loss: str) -> None:
    row = 1
    full = BASELINES[loss](make(), [make(seed=2)])
    less = BASELINES[loss](make(), [unshipped(make(seed=2), row)])
    for name, values in full.items():
        others = np.arange(len(values)) != row
        np.testing.assert_array_equal(less[name][others], values[others])
    silent = {
        "infifusion": lambda t: not t["rank_mask"][row].any(),
        "infigfusion": lambda t: not t["rank_mask"][row].any(),
        "uld": lambda t: not t["uld_size"][row].any(),
        "minced": lambda t: t["probs"][row].tolist() == [1.0] + [0.0] * (TOP - 1),
        "gold": lambda t: not t["gold_tokens"][row].any(),
        "p_kl": lambda t: (t["teacher_ids"][row] == -1).all(),
    }[loss]
    assert silent(less)
    assert not silent(full)


# -- FuseLLM


def test_minced_takes_the_expert_that_reads_a_document_best_and_whole() -> None:
    one, two = make(seed=1), make(seed=2)
    sums = [np.add.reduceat(e.own_logprob, e.doc_offsets[:-1]) for e in (one, two)]
    found = minced_targets(make(), [one, two])
    for document, best in enumerate(np.argmax(sums, 0)):
        chosen = (one, two)[best]
        for row in range(*chosen.doc_offsets[document : document + 2]):
            probs = np.exp(chosen.topk_logprobs[row])
            assert found["ids"][row].tolist() == chosen.topk_ids[row].tolist()
            np.testing.assert_allclose(found["probs"][row], probs / probs.sum(), rtol=1e-5)


def test_minced_gives_the_label_alone_where_the_cuts_differ() -> None:
    student, expert = make(), make(OTHER, 1)
    found = minced_targets(student, [expert])
    np.testing.assert_allclose(found["probs"].sum(-1), 1, rtol=1e-5)
    alone = found["probs"][:, 0] == 1
    # "the" meets "the" and " he", one edit away; "lungs" leaves "gs" to its eos; "a" and "b"
    # both meet "ab".
    assert alone.tolist() == [True, True, False, False, True, True, True, True, False, False]
    assert (found["ids"][alone, 0] == student.token_ids[alone]).all()
    assert (found["ids"][alone, 1:] == -1).all()


def test_entries_that_map_to_one_id_are_added() -> None:
    # The expert's "xx" is nearest to the student's "x", which it has as well.
    student = build([[b"x", b"y"]], [b"", b"x", b"y"], top_k=3)[0]
    expert = build([[b"x", b"y"]], [b"", b"x", b"y", b"xx"], top_k=4)[0]
    found = minced_targets(student, [expert])
    for row in range(3):
        named = found["ids"][row][found["ids"][row] >= 0]
        assert len(set(named.tolist())) == len(named) == 3
        mass = {
            int(i): float(p)
            for i, p in zip(*(found[n][row] for n in ("ids", "probs")), strict=True)
        }
        probs = np.exp(expert.topk_logprobs[row])
        of_x = probs[np.isin(expert.topk_ids[row], [1, 3])].sum()
        assert mass[1] == pytest.approx(of_x / probs.sum(), rel=1e-5)


# -- dynamic time warping


def distance(a: bytes, b: bytes) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a):
        before, row = row, [i + 1]
        for j, y in enumerate(b):
            row.append(min(row[-1] + 1, before[j + 1] + 1, before[j] + (x != y)))
    return row[-1]


PIECES = st.lists(
    st.binary(max_size=4).map(lambda b: bytes(x % 3 for x in b)), min_size=1, max_size=8
)


@settings(max_examples=60, deadline=None)
@given(PIECES, PIECES)
def test_the_path_is_the_cheapest_and_edit_distances_are_levenshteins(
    a: list[bytes], b: list[bytes]
) -> None:
    pairs = [(x, y) for x in a for y in b]
    costs = edit_distances(*map(list, zip(*pairs, strict=True))).reshape(len(a), len(b))
    assert costs.tolist() == [[distance(x, y) for y in b] for x in a]
    best: dict[tuple[int, int], int] = {}
    for i in range(len(a)):
        for j in range(len(b)):
            before = [best[k] for k in ((i - 1, j), (i, j - 1), (i - 1, j - 1)) if k in best]
            best[i, j] = int(costs[i, j]) + min(before, default=0)
    path = warping_path(costs, np.zeros(len(a), np.int64), len(b))
    assert path[0] == (0, 0)
    assert path[-1] == (len(a) - 1, len(b) - 1)
    assert sum(costs[i, j] for i, j in path) == best[len(a) - 1, len(b) - 1]
    assert all((k - i, m - j) in {(0, 1), (1, 0), (1, 1)} for (i, j), (k, m) in pairwise(path))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 40), st.integers(0, 300))
def test_a_band_is_enough_for_cuts_that_differ_a_little(at: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    mine = [bytes(rng.integers(97, 123, 3).tolist()) for _ in range(60)]
    theirs = [*mine[:at], mine[at][:1], mine[at][1:], *mine[at + 1 :]]
    found = one_to_one(mine, theirs, band=4)
    # The two halves may take a neighbour along, if they are nearer to it.
    assert found[: max(at - 1, 0)].tolist() == list(range(max(at - 1, 0)))
    assert found[at + 2 :].tolist() == list(range(at + 3, 61))


# -- GOLD and X-Token


def test_golds_groups_are_chunks_of_equal_bytes_with_the_chain_rule() -> None:
    student, expert = make(), make(OTHER, 1)
    found = gold_targets(student, [expert])
    assert found["gold_tokens"][:, 0].tolist() == [1, 1, 1, 1, 1, 1, 2, 0, 1, 1]
    # " heart" is " he" and "art" there: what it says of " he", times its chance of "art".
    mass = found["gold_probs"][1, 0].sum() + found["gold_rest"][1, 0].sum()
    wanted = np.exp(expert.topk_logprobs[1]).sum() * np.exp(expert.own_logprob[2])
    assert mass == pytest.approx(float(wanted), rel=1e-5)


def test_p_kl_reads_the_experts_ids_one_vocabulary_after_the_other() -> None:
    student, experts = make(), [make(seed=1), make(OTHER, 2)]
    size = experts[0].header.vocab_size
    found = projection_targets(student, experts)
    np.testing.assert_array_equal(found["teacher_ids"][:, 0], experts[0].topk_ids)
    assert found["teacher_ids"][7].max(initial=-1, where=np.asarray([[False], [True]])) == -1
    shared = projection_shared(student, experts)
    assert shared["projection_size"] == 2 * size
    share = np.zeros(size)
    np.add.at(share, shared["projection_student"], shared["projection_share"])
    assert set(np.round(share, 5)) <= {0.0, 2.0}  # each student id gives all to each teacher


@pytest.mark.parametrize("loss", sorted(BASELINES))
def test_every_baseline_trains_on_the_targets_made_for_it(loss: str) -> None:
    student, experts = make(), [make(seed=1), make(OTHER, 2)]
    targets, size = BASELINES[loss](student, experts), student.header.vocab_size
    assert set(targets) == set(OBJECTIVES[loss].needs)
    shared = SHARED[loss](student, experts) if loss in SHARED else {}
    assert set(shared) == set(OBJECTIVES[loss].shares)
    labels = torch.from_numpy(student.token_ids.astype(np.int64))[None]
    batch = FusionBatch(
        labels.roll(1, dims=-1),
        labels,
        {name: torch.from_numpy(values)[None] for name, values in targets.items()},
        {name: torch.from_numpy(values) for name, values in shared.items()},
    )
    run = FusionSettings(
        train=TrainConfig(steps=1, lr=0.1, warmup_steps=0, decay_steps=0),
        batch_size=1,
        seq_len=10,
        loss=loss,
        distill_weight=1.0,
    )
    net = Table(size)
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    costs = []
    for _ in range(30):
        optimizer.zero_grad()
        cost, _ = fusion_loss(net, batch, run)
        cost.backward()
        optimizer.step()
        costs.append(float(cost.detach()))
    assert costs[-1] < costs[0]


class Table(torch.nn.Module):
    """Logits of their own for every position."""

    def __init__(self, size: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.logits = torch.nn.Parameter(torch.randn(1, 10, size))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> "Table":
        return self
