"""JSON with one spelling for each value: what is hashed or signed is these bytes."""

import json
from typing import Final

_TOO_LARGE: Final = 2**53
"""Beyond it not every reader of JSON has whole numbers."""


def canonical(value: object) -> bytes:
    """JSON with sorted keys and no spaces.

    The same bytes as RFC 8785 for what it takes: texts, whole numbers below 2**53, truth values,
    null, lists, and objects whose keys are ASCII. Numbers with fractions are written as texts.
    Raises: TypeError for anything else.
    """
    _check(value)
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise TypeError("found a lone surrogate, wanted text") from None


def _check(value: object) -> None:
    if isinstance(value, dict):
        if not all(isinstance(key, str) and key.isascii() for key in value):
            raise TypeError("found a key that is no ASCII text, wanted all keys to be")
        for item in value.values():
            _check(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item)
    elif isinstance(value, int) and abs(value) < _TOO_LARGE:
        pass
    elif not isinstance(value, str | None):
        raise TypeError(f"found {type(value).__name__} {str(value)[:30]}, wanted text or integer")
