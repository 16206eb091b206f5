"""From contributions to targets on disk: align, route, cap and pack, a shard of documents a time.

Shapes: P = rows of the pivot's stream, S = candidates (base pivot first), D = documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fusion.baselines import BASELINES, SHARED
from fusion.codec import LogitFile
from fusion.contribution import LogitSource
from fusion.credit import ALL, Routing, summed
from fusion.extract import extract_to_file
from fusion.models import encode_documents, eos_id
from fusion.routing import (
    Weights,
    most_of_all,
    over,
    route,
    scale_experts,
    share_factors,
    without_base,
)
from fusion.settings import FusionSettings
from fusion.shards import Shards
from fusion.suspicion import Signs, Suspicion, suspects
from fusion.target_store import TargetStore, has_targets, read_targets, write_targets
from fusion.targets import Arrays, certain_mass, chunk_targets, span_targets

_ROUTING: Final = "routing.npz"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a run learns from, and who was listened to."""

    store: TargetStore
    routing: Routing | None
    """None for losses that do not route."""


def prepare(
    pivot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    contributions: Mapping[str, LogitSource],
    settings: FusionSettings,
    folder: Path,
    *,
    written: Sequence[bool] | None = None,
) -> Prepared:
    """Align, route and pack everything the run learns from, unless the folder holds it already.

    Args: pivot: the base; it is asked what it thinks of the prompts itself. folder: of this run
        alone. written: of each prompt, whether the pivot wrote it (an on-policy round): its own
        words are not to be learnt by heart, and it is no judge of them. Only losses that route
        know the difference.
    Raises: ValueError when there is nothing to learn from, contributions are not of one prompt
        set, not of these prompts or not finite, or the folder holds another run's targets.
    """
    ids = encode_documents(tokenizer, prompts).astype(np.int32)
    stream = np.concatenate([np.asarray([eos_id(tokenizer)], np.int32), ids])
    if settings.loss == "none":
        return Prepared(TargetStore(stream), None)
    if not contributions:
        raise ValueError(f"loss {settings.loss!r} needs contributions; give some or loss 'none'")
    flags = np.zeros(len(prompts), bool) if written is None else np.asarray(written, bool)
    if len(flags) != len(prompts):
        raise ValueError(f"written has {len(flags)} flags for {len(prompts)} prompts")
    origin = _origin(contributions, settings, ids, flags)
    if not has_targets(folder, origin):
        base = _ask_base(pivot, tokenizer, prompts, contributions, folder)

        def shards_of(names: Iterable[str]) -> Shards:
            return Shards(base, {n: contributions[n] for n in names}, ids, flags, tokenizer)

        shards = shards_of(contributions)
        shared = None
        if build := BASELINES.get(settings.loss):
            made: Iterator[Arrays] = (build(*shards.of(at)) for at in shards)
            if tell := SHARED.get(settings.loss):
                shared = tell(*shards.of(0))
        else:
            shards, weights_of, summary = _route_the_sincere(shards_of, contributions, settings)
            summary.save(folder / _ROUTING)
            made = _span_shards(shards, weights_of, settings)
        write_targets(folder, len(ids), made, origin, shared)
    routing = folder / _ROUTING
    return Prepared(
        read_targets(folder, stream), Routing.load(routing) if routing.exists() else None
    )


def _ask_base(
    pivot: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    contributions: Mapping[str, LogitSource],
    folder: Path,
) -> LogitFile:
    """Let the base say what it thinks of the prompts, as the experts did."""
    _require_one_prompt_set(contributions)
    headers = [source.header for source in contributions.values()]
    for name, header in zip(contributions, headers, strict=True):
        if header.documents != len(prompts):
            raise ValueError(
                f"{name} holds {header.documents} documents, the prompt set {len(prompts)}; "
                "extract its logits from this prompt set"
            )
    folder.mkdir(parents=True, exist_ok=True)
    extract_to_file(
        folder / "base.safetensors",
        pivot,
        tokenizer,
        prompts,
        top_k=min(max(h.top_k for h in headers), int(pivot.config.vocab_size)),
        prompt_set_sha256=headers[0].prompt_set_sha256,
        model_sha256="",
    )
    return LogitFile(folder / "base.safetensors", prompts)


def _origin(
    contributions: Mapping[str, LogitSource],
    settings: FusionSettings,
    ids: NDArray[np.int32],
    written_D: NDArray[np.bool_],
) -> str:
    """A digest of everything the targets are made of, but the pivot's weights."""
    headers = {name: asdict(source.header) for name, source in contributions.items()}
    chosen = {**asdict(settings), "train": None}
    told = (
        json.dumps([headers, chosen], sort_keys=True).encode() + ids.tobytes() + written_D.tobytes()
    )
    return hashlib.sha256(told).hexdigest()


def _require_one_prompt_set(contributions: Mapping[str, LogitSource]) -> None:
    sets = {name: source.header.prompt_set_sha256 for name, source in contributions.items()}
    if len(set(sets.values())) > 1:
        shown = ", ".join(f"{name}: {digest[:12]}" for name, digest in sorted(sets.items()))
        raise ValueError(
            f"contributions were computed on different prompt sets ({shown}); "
            "a fusion needs all of them on one"
        )


def _route_the_sincere(
    shards_of: Callable[[Iterable[str]], Shards], names: Iterable[str], settings: FusionSettings
) -> tuple[Shards, Callable[[int], Weights], Routing]:
    """Route; leave the worst suspect out and route again, until there is none.

    Each is judged as it is listened to, and one poisoner's weight hides another's lies.
    """
    kept, excluded = sorted(names), list[str]()
    signs: dict[str, Signs] = {}
    most = (len(kept) - 1) // 2
    while True:
        shards = shards_of(kept)
        weights_of, summary = _route(shards, settings)
        signs |= _signs(shards, weights_of)
        found = suspects({name: signs[name] for name in kept})
        if settings.suspects == "report" or not found or len(excluded) == most:
            return shards, weights_of, replace(summary, signs=signs, excluded=tuple(excluded))
        excluded.append(found[0])
        kept.remove(found[0])


def _signs(shards: Shards, weights_of: Callable[[int], Weights]) -> Mapping[str, Signs]:
    """Say how far each source is from what the text says, where it is listened to.

    What the pivot wrote itself is no text that anybody's words could be held against.
    """
    suspicion = Suspicion(shards.names[1:])
    for at in shards:
        student, experts = shards.of(at)
        public_P1 = ~shards.written(at, student)[:, None]
        suspicion.add(student, experts, weights_of(at)[:, 1:] * public_P1)
    return suspicion.signs()


def _route(shards: Shards, settings: FusionSettings) -> tuple[Callable[[int], Weights], Routing]:
    """Return the weights by shard and a summary; sources over their total share are scaled down.

    What one loses may put another over its share, so this goes on until nobody is.
    """
    standing_S = np.array([settings.standing.get(name, 1.0) for name in shards.names[1:]])
    # Whoever has lost nothing may take what the others lose.
    scalings = [np.where(standing_S < 1, standing_S, np.inf)] if (standing_S < 1).any() else []

    def weights_of(at: int) -> Weights:
        student, experts = shards.of(at)
        weights_PS = without_base(
            route(student, [student, *experts], settings), shards.written(at, student)
        )
        for factors in scalings:
            weights_PS = scale_experts(weights_PS, factors)
        return weights_PS

    def summary() -> Routing:
        means, tokens = [], []
        for at in shards:
            offsets = shards.of(at)[0].doc_offsets
            means.append(summed(weights_of(at), offsets))
            tokens.append(np.diff(offsets))
        return Routing(shards.names, np.concatenate(tokens), np.concatenate(means))

    most = most_of_all(settings, len(shards.names) - 1)
    found = summary()
    # Each turn brings one source more to its share for good.
    for _ in shards.names[1:]:
        factors = share_factors(np.asarray(list(found.shares()[ALL].values())), most)
        if not over(factors):
            break
        scalings.append(factors)
        found = summary()
    return weights_of, found


def _span_shards(
    shards: Shards, weights_of: Callable[[int], Weights], settings: FusionSettings
) -> Iterator[Arrays]:
    for at in shards:
        student, experts = shards.of(at)
        weights_PS = weights_of(at)
        targets = span_targets(
            student,
            [student, *experts],
            weights_PS,
            shards.maps,
            kept=settings.kept,
            other=settings.other,
        )
        if settings.alm_weight:
            targets |= chunk_targets(student, experts, weights_PS[:, 1:])
        certain_P = certain_mass(student, experts, weights_PS[:, 1:])
        written_P = shards.written(at, student)
        targets["ce_weight"] = _ce_weight(certain_P, written_P, settings.distill_weight)
        yield targets


def _ce_weight(
    certain_P: NDArray[np.float32], written_P: NDArray[np.bool_], share: float
) -> NDArray[np.float32]:
    """Return [P] how much of its cross-entropy a row keeps: what certain experts do not say too.

    share * certain is cross-entropy already, and (1 - share) is how much of it was asked for.
    """
    asked = max(1 - share, 1e-6)
    left_P = np.clip(1 - share * certain_P / asked, 0, 1)
    return np.where(written_P, 0, left_P).astype(np.float32)
