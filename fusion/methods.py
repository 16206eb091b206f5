"""The methods of fusion: what each reads, and what it makes of the logits of a chunk.

A method is a function of a chunk and a row of OBJECTIVES; the formulas are in fusion.losses.
Shapes: B = windows of a batch, T = tokens of a window, t = positions of a chunk, of all B * T,
V = student vocabulary, S = experts, C = kept ids, K = kept ranks, X = ids of all teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor, nn

from fusion import losses
from fusion.fused import selected_logprobs
from fusion.settings import FusionSettings


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some consecutive positions of a batch, as a method sees them."""

    logits: Tensor
    """[t, V]."""
    labels_t: Tensor
    """[t] int64 in [0, V)."""
    counted_t: Tensor
    """[t] bool: False where the label is IGNORED."""
    targets: Mapping[str, Tensor]
    """Each [t, ...]."""
    shared: Mapping[str, Tensor]
    start: int
    """Of all N, the first one here."""
    width: int
    """T."""


@dataclass(frozen=True, slots=True)
class Objective:
    """A method of fusion."""

    terms: Callable[[Chunk, FusionSettings], Mapping[str, Tensor]]
    """The sums over a chunk of "ce" and of each name in `weights`."""
    weights: Callable[[FusionSettings], Mapping[str, float]]
    """What D adds up, and with what weights."""
    needs: tuple[str, ...] = ()
    """The targets it reads."""
    shares: tuple[str, ...] = ()
    """What it reads of FusionBatch.shared."""
    inside: Callable[[Mapping[str, Tensor]], Tensor] | None = None
    """From targets [B, T, ...] to [B, T] bool: True where a position may not be parted from the
    one before it, because a term reads the logits of both."""


def _own(chunk: Chunk) -> Tensor:
    """Return [t] the log-probabilities of the labels."""
    return -nn.functional.cross_entropy(_wide(chunk.logits), chunk.labels_t, reduction="none")


def _ce(own_t: Tensor, chunk: Chunk) -> Tensor:
    weight_t = chunk.targets.get("ce_weight", torch.ones_like(own_t))
    return -(own_t * weight_t * chunk.counted_t).sum()


def _wide(logits_tV: Tensor) -> Tensor:
    return logits_tV.to(torch.promote_types(logits_tV.dtype, torch.float32))


def _none(chunk: Chunk, _: FusionSettings) -> Mapping[str, Tensor]:
    return {"ce": _ce(_own(chunk), chunk)}


def _span_kl(chunk: Chunk, settings: FusionSettings) -> Mapping[str, Tensor]:
    targets = chunk.targets
    own_t, log_s_tC, log_other_t = selected_logprobs(
        chunk.logits, chunk.labels_t, targets["ids"].long()
    )
    kl_t = losses.span_kl(log_s_tC, log_other_t, targets["probs"])
    terms = {
        "ce": _ce(own_t, chunk),
        "span_kl": (targets["weight"] * chunk.counted_t * kl_t).sum(),
    }
    if "chunk_length" not in chunk.targets:
        return terms | {"alm": own_t.new_zeros(())}
    return terms | {"alm": _alm(own_t, chunk, settings.alm_temperature)}


def _alm(own_t: Tensor, chunk: Chunk, temperature: float) -> Tensor:
    """Return the weighted ALM of the chunks of text that lie whole in a window and all count."""
    length_tS = chunk.targets["chunk_length"].long()
    place_t = (chunk.start + torch.arange(len(own_t), device=own_t.device)) % chunk.width
    end, expert = ((length_tS > 0) & (length_tS <= place_t[:, None] + 1)).nonzero(as_tuple=True)
    length_N = length_tS[end, expert]
    # In fp64: differences of sums over a whole chunk of positions.
    before_t = nn.functional.pad(own_t.double().cumsum(-1), (1, 0))
    counted_t = nn.functional.pad(chunk.counted_t.cumsum(-1), (1, 0))
    all_N = counted_t[end + 1] - counted_t[end + 1 - length_N] == length_N
    student_N = before_t[end + 1] - before_t[end + 1 - length_N]
    teacher_N = chunk.targets["chunk_logprob"][end, expert].double()
    matched_N = losses.alm(student_N, teacher_N, temperature)
    weighted = chunk.targets["chunk_weight"][end, expert] * all_N * matched_N
    return weighted.sum().to(own_t.dtype)


def _inside_chunks(targets: Mapping[str, Tensor]) -> Tensor:
    """Return [B, T] True at all tokens of a chunk of text but its first."""
    if "chunk_length" not in targets:
        return torch.zeros(targets["ids"].shape[:2], dtype=torch.bool)
    length_BTS = targets["chunk_length"].long()
    window, end, expert = (length_BTS > 1).nonzero(as_tuple=True)
    first = end - length_BTS[window, end, expert] + 1
    return _inside(window, first, end, length_BTS.shape[:2])


def _inside_groups(targets: Mapping[str, Tensor]) -> Tensor:
    length_BTS = targets["gold_tokens"].long()
    window, first, expert = (length_BTS > 1).nonzero(as_tuple=True)
    end = first + length_BTS[window, first, expert] - 1
    return _inside(window, first, end, length_BTS.shape[:2])


def _inside(window: Tensor, first: Tensor, end: Tensor, shape: torch.Size) -> Tensor:
    """Return [B, T] True from first + 1 to end of each run that lies whole in its window."""
    edges = torch.zeros((shape[0], shape[1] + 1), dtype=torch.int32)
    whole = (first >= 0) & (end < shape[1])
    one = torch.ones(int(whole.sum()), dtype=torch.int32)
    edges.index_put_((window[whole], first[whole] + 1), one, accumulate=True)
    edges.index_put_((window[whole], end[whole] + 1), -one, accumulate=True)
    return edges.cumsum(-1)[:, :-1] > 0


def _whole_windows(targets: Mapping[str, Tensor]) -> Tensor:
    return torch.ones(targets["rank_mask"].shape[:2], dtype=torch.bool)


def _span_weights(settings: FusionSettings) -> Mapping[str, float]:
    return {"span_kl": 1.0} | ({"alm": settings.alm_weight} if settings.alm_weight else {})


def _infifusion(chunk: Chunk, _: FusionSettings) -> Mapping[str, Tensor]:
    mask_tS = chunk.targets["rank_mask"] & chunk.counted_t[:, None]
    gap_t = losses.infifusion(_wide(chunk.logits), chunk.targets["rank_probs"], mask_tS)
    return {"ce": _ce(_own(chunk), chunk), "infifusion": gap_t.sum()}


def _infigfusion(chunk: Chunk, settings: FusionSettings) -> Mapping[str, Tensor]:
    """Return the token term, InfiFusion's, and the graph term of each window and teacher."""
    teacher_tSK, mask_tS = chunk.targets["rank_probs"], chunk.targets["rank_mask"]
    mask_tS = mask_tS & chunk.counted_t[:, None]
    top_tK = _wide(chunk.logits).topk(teacher_tSK.shape[-1], dim=-1).values
    student_tK = losses.standardize(top_tK)
    gaps = [
        losses.rank_graph(student_TK, losses.features(teacher_TSK[:, s]), mask_TS[:, s])
        * mask_TS[:, s].sum()
        for student_TK, teacher_TSK, mask_TS in zip(
            *(torch.split(x, chunk.width) for x in (student_tK, teacher_tSK, mask_tS)), strict=True
        )
        for s in range(mask_tS.shape[1])
    ]
    terms = dict(_infifusion(chunk, settings))
    return terms | {"graph": torch.stack(gaps).sum() / mask_tS.shape[1]}


def _uld(chunk: Chunk, _: FusionSettings) -> Mapping[str, Tensor]:
    t, logits_tV = chunk.targets, _wide(chunk.logits)
    size_tS = t["uld_size"] * chunk.counted_t[:, None]
    teachers = range(size_tS.shape[1])
    gap_t = sum(
        losses.uld(logits_tV, t["uld_probs"][:, s], t["uld_each"][:, s], size_tS[:, s])
        for s in teachers
    )
    return {"ce": _ce(_own(chunk), chunk), "uld": _mean(gap_t, len(teachers))}


def _minced(chunk: Chunk, _: FusionSettings) -> Mapping[str, Tensor]:
    own_t, log_s_tC, _other = selected_logprobs(
        chunk.logits, chunk.labels_t, chunk.targets["ids"].long()
    )
    cross_t = losses.cross_entropy(log_s_tC, chunk.targets["probs"])
    return {"ce": _ce(own_t, chunk), "minced": (cross_t * chunk.counted_t).sum()}


def _p_kl(chunk: Chunk, _: FusionSettings) -> Mapping[str, Tensor]:
    ids_tSK, probs_tSK = chunk.targets["teacher_ids"].long(), chunk.targets["teacher_probs"]
    to_teachers_XV = _projection(chunk)
    teachers = range(ids_tSK.shape[1])
    kl_t = sum(
        losses.projected_kl(_wide(chunk.logits), to_teachers_XV, ids_tSK[:, s], probs_tSK[:, s])
        for s in teachers
    )
    return {"ce": _ce(_own(chunk), chunk), "p_kl": _mean(kl_t * chunk.counted_t, len(teachers))}


def _projection(chunk: Chunk) -> Tensor:
    """Return W transposed, sparse [X, V]: student ids' shares in all teachers' ids."""
    shared = chunk.shared
    places = torch.stack([shared["projection_teacher"], shared["projection_student"]]).long()
    size = (int(shared["projection_size"]), chunk.logits.shape[-1])
    share = shared["projection_share"]
    return torch.sparse_coo_tensor(places, share, size, check_invariants=False)


def _gold(chunk: Chunk, _: FusionSettings) -> Mapping[str, Tensor]:
    """Return GOLD over the groups that lie whole in a window; a group is its first position's."""
    own_t, t, tokens_tS = _own(chunk), chunk.targets, chunk.targets["gold_tokens"].long()
    place_t = torch.arange(len(own_t), device=own_t.device)
    left_t = chunk.width - (chunk.start + place_t) % chunk.width
    probs_tV = _wide(chunk.logits).softmax(-1)
    before_t = nn.functional.pad(own_t.double().cumsum(-1), (1, 0))
    total = own_t.new_zeros(())
    for s, share in enumerate(chunk.shared["gold_share"].tolist()):
        starts = (tokens_tS[:, s] > 0) & (tokens_tS[:, s] <= left_t) & chunk.counted_t
        at = starts.nonzero()[:, 0]
        rest_N = before_t[at + tokens_tS[at, s]] - before_t[at + 1]
        merged_NV = probs_tV[at] * rest_N.exp().to(probs_tV.dtype)[:, None]
        halves_N2 = losses.gold(
            merged_NV,
            chunk.shared["gold_matched"][s],
            *(t[name][at, s] for name in ("gold_ids", "gold_probs", "gold_rest")),
        )
        total = total + share * halves_N2[:, 0].sum() + (1 - share) * halves_N2[:, 1].sum()
    return {"ce": _ce(own_t, chunk), "gold": total / tokens_tS.shape[1]}


def _mean(values_t: Tensor | int, teachers: int) -> Tensor:
    assert isinstance(values_t, Tensor)
    return values_t.sum() / teachers


OPTIONAL: Final = frozenset({"chunk_length", "chunk_logprob", "chunk_weight", "ce_weight"})
"""Targets that a batch may lack: sources that cut the text as the pivot does have no chunks, and
text that the pivot did not write itself counts in full."""

RANKS: Final = ("rank_probs", "rank_mask")


def _only(*names: str) -> Callable[[FusionSettings], Mapping[str, float]]:
    return lambda _: dict.fromkeys(names, 1.0)


OBJECTIVES: Final[Mapping[str, Objective]] = MappingProxyType(
    {
        "none": Objective(_none, _only()),
        "span_kl": Objective(
            _span_kl, _span_weights, ("ids", "probs", "weight"), inside=_inside_chunks
        ),
        "infifusion": Objective(_infifusion, _only("infifusion"), RANKS),
        "infigfusion": Objective(
            _infigfusion, _only("infifusion", "graph"), RANKS, inside=_whole_windows
        ),
        "uld": Objective(_uld, _only("uld"), ("uld_probs", "uld_each", "uld_size")),
        "minced": Objective(_minced, _only("minced"), ("ids", "probs")),
        "p_kl": Objective(
            _p_kl,
            _only("p_kl"),
            ("teacher_ids", "teacher_probs"),
            shares=(
                "projection_student",
                "projection_teacher",
                "projection_share",
                "projection_size",
            ),
        ),
        "gold": Objective(
            _gold,
            _only("gold"),
            ("gold_tokens", "gold_ids", "gold_probs", "gold_rest"),
            ("gold_matched", "gold_share"),
            _inside_groups,
        ),
    }
)
