"""All that can be known before the work: whether a local fusion can run, and what it will cost.

Loads tokenizers and headers, never weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from cofuse.local_merge import check_merge
from cofuse.local_models import Kind, LocalInputError, Model, kind_of, read_model
from cofuse.local_pairs import PairsChecked, PairsRead, check_pairs, read_by, read_file
from cofuse.local_spec import LocalSpec
from cofuse.local_tokens import Starts, cut, row_bytes, shared_places
from fusion.codec import check_logits
from fusion.contribution import ContributionError
from protos.chunks import sha256_of
from protos.public_sets import PublicSetError, read_evals, read_prompts

_OF_METHOD: Final[dict[str, frozenset[Kind]]] = {
    "unified": frozenset({"model", "logits"}),
    "pairwise": frozenset({"model", "logits"}),
    "merge": frozenset({"model", "delta"}),
    "preference": frozenset({"model", "scores"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One source, checked."""

    name: str
    path: Path
    kind: Kind
    model: Model | None
    """None for a contribution file."""
    vocabulary: int | None = None
    tokens: int | None = None
    """Positions of the prompt set under the source's tokenizer, eos among them."""
    common: float | None = None
    """Share of the pivot's positions at which the source has read the same bytes."""
    one_to_one: float | None = None
    """Share of the pivot's positions at which both also read the same bytes next."""
    contribution_bytes: int | None = None
    pairs: PairsRead | None = None
    """How it reads the pairs (method preference)."""

    def facts(self) -> dict[str, Any]:
        """The row of the table."""
        model = self.model
        return {
            "name": self.name,
            "kind": self.kind,
            "path": str(self.path),
            "architecture": model.architecture if model else None,
            "parameters": model.parameters if model else None,
            **{key: getattr(self, key) for key in _MEASURED},
            "pairs": self.pairs and asdict(self.pairs),
        }


_MEASURED: Final = ("vocabulary", "tokens", "common", "one_to_one", "contribution_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A local fusion that can run."""

    spec: LocalSpec
    pivot: Model
    sources: tuple[Source, ...]
    prompts_sha256: str | None
    evals_sha256: str | None
    documents: int
    prompt_bytes: int
    pivot_tokens: int
    """Positions of the prompt set under the pivot's tokenizer."""
    pairs: PairsChecked | None = None
    """Of method preference, which has no prompt set."""

    @property
    def epochs(self) -> float | None:
        """How often a run reads the prompt set, or the pairs; None when nothing is trained."""
        training = self.spec.round.training
        if not trains(self.spec):
            return None
        if self.pairs is not None:
            return training.steps * training.batch_size / self.pairs.learned
        return training.steps * training.batch_size * training.seq_len / self.pivot_tokens

    def facts(self) -> dict[str, Any]:
        """Everything `--dry-run` tells, as JSON."""
        training = self.spec.round.training
        return {
            "method": self.spec.round.method,
            "pivot": {
                "path": str(self.pivot.folder),
                "architecture": self.pivot.architecture,
                "parameters": self.pivot.parameters,
                "vocabulary": self.pivot.vocabulary,
                "tokens": self.pivot_tokens or None,
            },
            "prompts": {"documents": self.documents, "bytes": self.prompt_bytes},
            "training": None
            if self.epochs is None
            else {**training.model_dump(), "epochs": round(self.epochs, 3)},
            "pairs": self.pairs and self.pairs.facts(),
            "sources": [source.facts() for source in self.sources],
        }


def trains(spec: LocalSpec) -> bool:
    """Whether anything is trained: a merge alone trains nothing."""
    return spec.round.method != "merge" or bool(spec.round.controls)


def check(spec: LocalSpec) -> Checked:
    """Look at everything a local fusion will use.

    Raises: LocalInputError, PublicSetError: what was found, wanted, and what to do.
    """
    pivot = _read(spec, spec.pivot, "pivot")
    sources = [_look(spec, name, path) for name, path in spec.sources.items()]
    _require_one_kind(spec, sources)
    for key, path in (("prompts", spec.prompts), ("pairs", spec.pairs), ("evals", spec.evals)):
        if path is not None and not path.is_file():
            raise LocalInputError(
                f"{key}: there is no file {path}; paths start at the spec's folder"
            )
    _check_evals(spec)
    checked = Checked(
        spec=spec,
        pivot=pivot,
        sources=tuple(sources),
        prompts_sha256=None if spec.prompts is None else sha256_of(spec.prompts),
        evals_sha256=None if spec.evals is None else sha256_of(spec.evals),
        documents=0,
        prompt_bytes=0,
        pivot_tokens=0,
    )
    if spec.round.method == "merge":
        check_merge(spec, pivot, {source.name: source.kind for source in sources})
    if spec.pairs is not None:
        return _check_pairs(checked)
    return checked if spec.prompts is None else _check_prompts(checked, read_prompts(spec.prompts))


def _read(spec: LocalSpec, folder: Path, key: str) -> Model:
    try:
        model = read_model(folder)
    except LocalInputError as error:
        raise LocalInputError(f"{key}: {error}") from error
    # A merge reads FP8 sources, tensor by tensor; whoever runs a model wants it plain.
    if model.quantized is not None and (key == "pivot" or spec.round.method != "merge"):
        raise LocalInputError(
            f"{key}: {folder} holds {model.quantized} weights, wanted fp32, fp16 or bf16; write "
            f"such a copy first: cofuse fp8 export --bf16 {folder} {folder}-bf16"
        )
    if key == "pivot" and len(model.weights) > 1:
        raise LocalInputError(
            f"pivot: {folder} holds {len(model.weights)} files of weights, wanted one, "
            'model.safetensors; write one with save_pretrained(..., max_shard_size="1TB")'
        )
    return model


def _look(spec: LocalSpec, name: str, path: Path) -> Source:
    key = f"sources.{name}"
    try:
        kind = kind_of(path)
    except LocalInputError as error:
        raise LocalInputError(f"{key}: {error}") from error
    method = spec.round.method
    if kind not in _OF_METHOD[method]:
        raise LocalInputError(
            f"{key}: {path} holds a {kind} contribution, and method {method} wants "
            f"{' or '.join(sorted(_OF_METHOD[method]))}"
        )
    model = _read(spec, path, key) if kind == "model" else None
    vocabulary = None if model is None else model.vocabulary
    return Source(name=name, path=path, kind=kind, model=model, vocabulary=vocabulary)


def _require_one_kind(spec: LocalSpec, sources: Sequence[Source]) -> None:
    kinds = {source.kind: source.name for source in sources}
    if spec.round.method == "merge" and len(kinds) > 1:
        raise LocalInputError(
            f"sources: {kinds['model']} is a model and {kinds['delta']} a delta; a merge wants "
            "all models or all deltas"
        )


def _check_evals(spec: LocalSpec) -> None:
    if spec.evals is None:
        return
    for name, domain in read_evals(spec.evals).domains.items():
        if not domain.questions and not any(domain.documents):
            raise PublicSetError(f"{spec.evals}: domain {name!r} has no text; leave it out")
        for number, question in enumerate(domain.questions):
            if question.answer >= len(question.options):
                raise PublicSetError(
                    f"{spec.evals}: question {number} of {name!r} has {len(question.options)} "
                    f"options and answer {question.answer}; answers count from 0"
                )


def _check_pairs(checked: Checked) -> Checked:
    """Read the pairs with every tokenizer, and the files of scores."""
    found = check_pairs(checked.spec, checked.pivot)

    def read(source: Source) -> Source:
        key, pairs = f"sources.{source.name}", found.whole.pairs
        if source.model is None:
            size = source.path.stat().st_size
            told = read_file(key, source.path, pairs)
            return replace(source, pairs=told, contribution_bytes=size)
        return replace(source, pairs=read_by(key, source.model, pairs))

    return replace(checked, pairs=found, sources=tuple(map(read, checked.sources)))


def _check_prompts(checked: Checked, prompts: Sequence[str]) -> Checked:
    """Spell the prompt set with every tokenizer, and compare where they cut it."""
    spec, pivot = checked.spec, checked.pivot
    starts = cut("pivot", pivot, prompts)
    tokens = sum(map(len, starts))
    training = spec.round.training
    if trains(spec):
        if tokens < training.seq_len:
            raise LocalInputError(
                f"training.seq_len: found {training.seq_len}, but the whole prompt set has only "
                f"{tokens} tokens of the pivot; give more text or a shorter seq_len"
            )
        if pivot.context is not None and training.seq_len > pivot.context:
            raise LocalInputError(
                f"training.seq_len: found {training.seq_len}, but the pivot sees "
                f"{pivot.context} tokens at once; lower it"
            )
    merges = spec.round.method == "merge"
    return replace(
        checked,
        documents=len(prompts),
        prompt_bytes=sum(len(prompt.encode()) for prompt in prompts),
        pivot_tokens=tokens,
        sources=checked.sources
        if merges
        else tuple(_measure(checked, source, prompts, starts) for source in checked.sources),
    )


def _measure(checked: Checked, source: Source, prompts: Sequence[str], pivot: Starts) -> Source:
    top_k = checked.spec.round.top_k
    if source.model is None:
        assert checked.prompts_sha256 is not None
        try:
            header = check_logits(
                source.path,
                prompt_set_sha256=checked.prompts_sha256,
                top_k=top_k,
                prompts=prompts,
            )
        except ContributionError as error:
            raise LocalInputError(f"sources.{source.name}: {source.path}: {error}") from error
        return replace(
            source,
            vocabulary=header.vocab_size,
            tokens=header.positions,
            contribution_bytes=source.path.stat().st_size,
        )
    if top_k > source.model.vocabulary:
        raise LocalInputError(
            f"top_k: found {top_k}, but sources.{source.name} has only "
            f"{source.model.vocabulary} ids; lower it"
        )
    starts = cut(f"sources.{source.name}", source.model, prompts)
    common, same = shared_places(pivot, starts)
    positions = sum(map(len, starts))
    return replace(
        source,
        tokens=positions,
        common=round(common, 4),
        one_to_one=round(same, 4),
        contribution_bytes=positions * row_bytes(top_k, source.model.vocabulary),
    )
