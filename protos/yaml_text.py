"""YAML as people write it in a spec: no references, no depth, no size that a file of ours needs.

A few lines of references may stand for a thousand million values, and a deep file for a stack that
overflows; both are refused before anything is built.
"""

import re
from typing import Any, Final

import yaml

MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 16
MAX_NUMBER: Final = 40
"""Characters of one: longer ones take time that grows with their square."""
MAX_PARTS: Final = 10_000
_NUMBER: Final = re.compile(r"[-+.0-9][-+.:_0-9a-fA-FxXoO]*")
_Loader: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast


def read_yaml(raw: bytes) -> tuple[yaml.Node | None, Any]:
    """The one document of a file: its nodes, which know their lines, and its values.

    Raises: yaml.YAMLError.
    """
    if len(raw) > MAX_BYTES:
        raise yaml.YAMLError(f"found {len(raw)} bytes, wanted at most {MAX_BYTES}")
    try:
        text = raw.decode("utf-8")
        _check(text)
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            return root, None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except (ValueError, OverflowError, RecursionError) as error:  # a 13th month; no UTF-8
        raise yaml.YAMLError(str(error)[:200]) from error


def _check(text: str) -> None:
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=_Loader)):
        at = f"line {event.start_mark.line + 1 if event.start_mark else 1}: found"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.YAMLError(f"{at} a reference (& or *), wanted what it stands for")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and _is_endless(event):
            raise yaml.YAMLError(f"{at} a number of {len(event.value)} digits, or none")
        if depth > MAX_DEPTH or number > MAX_PARTS:
            raise yaml.YAMLError(f"{at} more than {MAX_DEPTH} levels or {MAX_PARTS} parts")


def _is_endless(event: yaml.ScalarEvent) -> bool:
    """Whether it would be read as a number, and is longer than any."""
    is_long = event.implicit[0] and len(event.value) > MAX_NUMBER
    return is_long and _NUMBER.fullmatch(event.value) is not None
