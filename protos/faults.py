"""What is wrong with strict data, in words: the place, what was found, and the cure."""

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import yaml
from pydantic import BaseModel, ValidationError

_MOST: Final = 10
"""Faults that are told at once."""


def in_words(fault: Mapping[str, Any], top: type[BaseModel]) -> str:
    """One fault of a ValidationError. Args: top: the model that was read."""
    place = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        known = _model_at(fault["loc"][:-1], top)
        hint = _close(str(fault["loc"][-1]), list(known.model_fields))
        return f"unknown key {place!r}; {hint or 'known: ' + ', '.join(known.model_fields)}"
    told = not place or fault["type"] == "missing" or "found " in fault["msg"]
    found = "" if told else f", found {fault['input']!r:.80}"
    if fault["type"] == "literal_error":
        wanted = re.findall(r"'([^']*)'", str(fault.get("ctx", {}).get("expected", "")))
        found += "; " + hint if (hint := _close(str(fault["input"]), wanted)) else ""
    return f"{place + ': ' if place else ''}{fault['msg'].removeprefix('Value error, ')}{found}"


def with_lines(path: Path, root: Any, error: ValidationError, top: type[BaseModel]) -> str:
    """All faults of a YAML file, a line each, in the order of the file.

    Args: root: the file's node, as yaml.compose gives it; None: it is empty.
    """
    told = {(_line(root, fault["loc"]), in_words(fault, top)) for fault in error.errors()}
    shown = [f"{path}:{line}: {words}" for line, words in sorted(told)[:_MOST]]
    more = [f"and {len(told) - _MOST} more"] if len(told) > _MOST else []
    return "\n".join(shown + more)


def line_of(node: Any, path: tuple[int | str, ...]) -> int:
    """Line of the deepest key of `path` that the document holds, counted from 1."""
    line: int = node.start_mark.line + 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if part not in pairs:
                break
            key, node = pairs[part]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def _model_at(place: Sequence[str | int], top: type[BaseModel]) -> type[BaseModel]:
    """The model whose keys stand at `place`, as far down as one can tell."""
    models = [top]
    for part in place:
        named = [one for one in models if str(part) in one.model_fields]
        if named:
            models = _models_in(named[0].model_fields[str(part)].annotation) or named
    return models[0]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """Models that a type is made of: of `Model | None`, of `tuple[Model, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _line(root: Any, path: tuple[int | str, ...]) -> int:
    return 1 if root is None else line_of(root, path)


def _close(found: str, known: list[str]) -> str:
    close = difflib.get_close_matches(found, known, n=1)
    return f"did you mean {close[0]!r}?" if close else ""
