"""A configuration that cannot be used is told of by file, line, key and cure."""

from pathlib import Path

import pytest
from pydantic import Field

from protos.config import Address, ConfigError, StrictConfig, line_of, read_toml


class Inner(StrictConfig):
    layers: int = Field(ge=1)


class Row(StrictConfig):
    kinds: tuple[str, ...] = ()


class Outer(StrictConfig):
    name: str
    listen: Address = "localhost:1"
    inner: Inner | None = None
    row: tuple[Row, ...] = ()


def _refused(folder: Path, text: str) -> str:
    path = folder / "c.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        read_toml(path, Outer)
    return str(caught.value).removeprefix(f"{folder}/")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('name = "a"\nlisten = "h:70000"\n', "c.toml:2: listen: found 'h:70000', wanted host:port"),
        ('name = "a"\nlisten = "h"\n', "c.toml:2: listen: found 'h', wanted host:port"),
        ('nam = "a"\n', "c.toml:1: unknown key 'nam'; did you mean 'name'? (and 1 more)"),
        (
            'name = "a"\n[inner]\n# said\nlayer = 3\n',
            "c.toml:4: unknown key 'inner.layer'; did you",
        ),
        ('name = "a"\n[inner]\nlayers = 0\n', "c.toml:3: inner.layers: Input should be greater"),
        ('name = "a"\n[[row]]\n[[row]]\nkind = []\n', "c.toml:4: unknown key 'row.1.kind'; did"),
        ("inner = {layers = 1}\n", "c.toml: name: Field required"),
        ('name = "a"\ninner = 3\n', "c.toml:2: inner: Input should be a valid dictionary"),
    ],
)
def test_a_fault_has_file_line_and_cure(tmp_path: Path, text: str, says: str) -> None:
    assert _refused(tmp_path, text).startswith(says)


def test_the_line_is_that_of_the_deepest_key_which_the_text_names() -> None:
    text = "a = 1\n[b]\na = 2\n[[c.d]]\nx = 1\n[[c.d]]\nx = [\n  1,\n]\n"
    assert line_of(text, ("a",)) == 1
    assert line_of(text, ("b", "a")) == 3
    assert line_of(text, ("b", "missing")) == 2
    assert line_of(text, ("c", "d", 1, "x", 0)) == 7
    assert line_of(text, ("e",)) == 0
