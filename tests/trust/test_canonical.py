"""A value has one spelling, or none."""

from typing import Any

import pytest

from trust.canonical import canonical


def test_the_spelling_is_that_of_rfc_8785() -> None:
    value = {"b": [1, True, None], "a": 'é "\n\u2028/', "_": {}, "B": -(2**53) + 1}
    wanted = '{"B":-9007199254740991,"_":{},"a":"é \\"\\n\u2028/","b":[1,true,null]}'
    assert canonical(value) == wanted.encode()


@pytest.mark.parametrize("value", [1.5, 2**53, {"\u00e4": 1}, {1: 1}, b"x", "\ud800", {1, 2}])
def test_values_without_one_spelling_are_refused(value: Any) -> None:
    for hidden in (value, [value], {"a": value}):
        with pytest.raises(TypeError, match="found"):
            canonical(hidden)
