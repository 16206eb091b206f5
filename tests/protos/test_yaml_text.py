"""YAML that would stand for more than it is is refused before it is built."""

import pytest
import yaml

from protos.yaml_text import MAX_BYTES, MAX_DEPTH, MAX_PARTS, read_yaml


@pytest.mark.parametrize(
    "text", ["", "a: 1", "a: [1, {b: two}]\nc: 2026-01-01\nd: 'text'", "name: sha256:" + "0" * 64]
)
def test_plain_yaml_is_read_as_pyyaml_reads_it(text: str) -> None:
    root, values = read_yaml(text.encode())
    assert values == yaml.safe_load(text)
    assert (root is None) == (text == "")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: &x [1]\nb: *x", "line 1: found a reference"),
        ("a: 1\nb: *x", "line 2: found a reference"),
        ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "levels"),
        ("- 1\n" * MAX_PARTS, "parts"),
        ("a: " + "9" * 5000, "number"),
        ("a: 1" + ":59" * 20_000, "number"),
        ("a: " + "x" * MAX_BYTES, "bytes"),
        ("a: 2026-13-45", "month"),
        ("a: !!python/object:os.system x", "constructor"),
        ("a: 1\n---\nb: 2", "single document"),
    ],
)
def test_what_no_spec_needs_is_refused(text: str, says: str) -> None:
    with pytest.raises(yaml.YAMLError, match=says):
        read_yaml(text.encode())


def test_what_is_no_text_is_refused() -> None:
    with pytest.raises(yaml.YAMLError, match="utf-8"):
        read_yaml(b"a: \xff")
