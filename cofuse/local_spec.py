"""The spec of a local fusion: a round spec whose pivot and sources are folders and files here.

What the two share (method, loss, training, ...) is validated by RoundSpec itself, so that a key
means the same with and without a coordinator.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import Field, ValidationError

from protos.faults import line_of
from protos.spec import METHODS as ROUND_METHODS
from protos.spec import Name, RoundSpec, SpecError, Strict, first_message

LOCAL_PIVOT: Final = "pivot-0"
"""What a round spec calls its pivot; a local fusion's is a folder and has no such name."""
FEDERATED: Final = (
    *("participants", "kind", "quorum", "deadline_minutes", "fusion_minutes", "grow", "rehearse"),
    "purpose",
)
"""Keys of a round that a local fusion has no use for."""
UNTRAINED: Final = {"steps": 1, "lr": 1e-6}
"""Fills RoundSpec.training for a merge, which trains nothing."""


class _Places(Strict):
    """What a local fusion says otherwise than a round. Paths start at the spec's folder."""

    pivot: str = Field(min_length=1)
    """Hugging Face model directory to start from."""
    sources: dict[Name, str] = Field(min_length=1, max_length=1000)
    """By name: a model directory, or a contribution file."""
    prompts: str | None = None
    pairs: str | None = None
    evals: str | None = None

    def files(self) -> dict[str, str | None]:
        """The public files by key."""
        return {"prompts": self.prompts, "pairs": self.pairs, "evals": self.evals}


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalSpec:
    """One local fusion; every path is absolute."""

    path: Path
    pivot: Path
    sources: Mapping[str, Path]
    """By name, sorted."""
    prompts: Path | None
    pairs: Path | None
    """Pairs of answers, for method preference."""
    evals: Path | None
    round: RoundSpec
    """All the rest, as a round of which the sources are the participants."""


_KIND_OF: Final = {method: kind for kind, methods in ROUND_METHODS.items() for method in methods}
METHODS: Final = tuple(_KIND_OF)
PAIR_KEYS: Final = (
    *("name", "pivot", "sources", "method", "pairs", "evals", "preference", "precision"),
    *("training", "controls", "seed"),
)
"""Every key of the spec of a preference fusion."""
_NOT_KEYS: Final = {*FEDERATED, "pairs", "preference"}
KEYS: Final = tuple(
    dict.fromkeys(
        ["name", "pivot", "sources", *(k for k in RoundSpec.model_fields if k not in _NOT_KEYS)]
    )
)
"""Every key of a local fusion's spec, but for method preference."""


def load_local_spec(path: Path) -> LocalSpec:
    """Read a spec from YAML.

    Raises: SpecError with file, line and cure for unknown keys, keys that stand twice, wrong
        types, what does not fit together, and broken YAML.
    """
    root, values = _read_yaml(path)
    _require_known(path, root, values)
    try:
        places = _Places.model_validate({k: values[k] for k in _Places.model_fields if k in values})
        round_spec = RoundSpec.model_validate(_as_round(path, values))
    except ValidationError as error:
        line = line_of(root, error.errors()[0]["loc"])
        raise SpecError(f"{path}:{line}: {first_message(error)}") from error
    if round_spec.kind == "weights" and places.prompts is None and round_spec.controls:
        line = line_of(root, ("controls",))
        raise SpecError(
            f"{path}:{line}: controls: {', '.join(round_spec.controls)} train on the prompt set, "
            "and this merge has none; leave controls out, or give prompts and training"
        )
    folder = path.resolve().parent
    found = {k: folder / Path(v).expanduser() for k, v in sorted(places.sources.items())}
    optional = {
        k: None if v is None else folder / Path(v).expanduser() for k, v in places.files().items()
    }
    pivot = folder / Path(places.pivot).expanduser()
    return LocalSpec(path=path, pivot=pivot, sources=found, round=round_spec, **optional)


def _as_round(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same fusion as a round of the sources."""
    own = {k: v for k, v in values.items() if k not in ("pivot", "sources")}
    method = own["method"]
    stem = re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:40]
    defaults: dict[str, Any] = {"name": stem or "fusion"}
    if method == "merge" and not own.get("controls"):
        defaults["training"] = UNTRAINED
    return {
        **defaults,
        **own,
        "pivot": LOCAL_PIVOT,
        "participants": tuple(sorted(values["sources"])),
        "kind": _KIND_OF[method],
    }


def _require_known(path: Path, root: Any, values: Mapping[Any, Any]) -> None:
    method = values.get("method")
    if "method" in values and method not in METHODS:
        line = line_of(root, ("method",))
        raise SpecError(
            f"{path}:{line}: method: found {method!r:.80}, wanted {', '.join(METHODS[:-1])} or "
            f"{METHODS[-1]}"
        )
    known = PAIR_KEYS if method == "preference" else KEYS
    for key in values:
        line = line_of(root, (str(key),))
        if key in FEDERATED:
            raise SpecError(
                f"{path}:{line}: key {key!r} belongs to a round of a coordinator; a local fusion "
                "has sources, all of which take part: leave it out"
            )
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            told = f"unknown key {key!r}"
            if key in (*KEYS, *PAIR_KEYS):
                told = f"method {method} has no use for the key {key!r}"
            raise SpecError(f"{path}:{line}: {told}; {hint}")
    if missing := [key for key in ("pivot", "sources", "method") if key not in values]:
        raise SpecError(f"{path}:1: {missing[0]} is missing; see docs/fuse.md for a whole spec")
    sources = values["sources"]
    if not isinstance(sources, dict) or not all(isinstance(name, str) for name in sources):
        line = line_of(root, ("sources",))
        raise SpecError(
            f"{path}:{line}: sources: found {sources!r:.80}, wanted names with paths, as in "
            "{first: ./expert-a, second: ./expert-b}"
        )


def _read_yaml(path: Path) -> tuple[Any, dict[Any, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _require_once(path, root)
        values = yaml.safe_load(text)
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise SpecError(f"{path}: found no keys, wanted the spec of a fusion; see docs/fuse.md")
    return root, values


def _require_once(path: Path, root: Any) -> None:
    """Refuse a key that stands twice: YAML would keep the last one, without a word."""
    todo, done = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in done:  # an alias
            continue
        done.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            todo += node.value
        if not isinstance(node, yaml.MappingNode):
            continue
        seen: dict[str, int] = {}
        for key, value in node.value:
            todo.append(value)
            if not isinstance(key, yaml.ScalarNode):
                continue
            line = key.start_mark.line + 1
            if key.value in seen:
                raise SpecError(
                    f"{path}:{line}: {key.value!r} stands here and in line {seen[key.value]}; "
                    "keep one"
                )
            seen[key.value] = line
