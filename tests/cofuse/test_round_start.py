"""A spec that `cofuse round init` prints can be run, and its comments tell the truth."""

import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cofuse.cli import app
from cofuse.round_start import Kind, starting_spec
from protos.spec import RoundSpec, TrainingSpec, load_spec
from protos.spec_parts import PreferenceSpec

KINDS: tuple[Kind, ...] = ("logits", "weights", "pairs")


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_a_spec_as_it_stands(kind: Kind, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["round", "init", "--kind", kind, "--name", "first"])
    path = tmp_path / "round.yaml"
    path.write_text(done.stdout)
    spec = load_spec(path)
    assert (spec.kind, spec.name) == (kind, "first")


@pytest.mark.parametrize("kind", KINDS)
def test_each_commented_key_is_one_and_shows_its_default(kind: Kind) -> None:
    text = starting_spec(kind, name="a", pivot="pivot-3", participants=["x", "y"])
    found = re.findall(r"^( *)#( +)([a-z_]+):(.*?)(?:  .*)?$", text, re.MULTILINE)
    assert len(found) > 5
    for indent, deep, key, value in found:
        if key == "preference":  # its keys follow
            continue
        model = TrainingSpec if indent else PreferenceSpec if len(deep) > 1 else RoundSpec
        field = model.model_fields[key]
        told = yaml.safe_load(value.partition("#")[0])
        if not isinstance(told, dict) and key != "quorum":
            assert told == field.default, key
        elif isinstance(told, dict):
            TrainingSpec.model_validate(told)


def test_it_is_written_once_and_never_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    first = CliRunner().invoke(app, ["round", "init", "-o", str(path)])
    assert (first.exit_code, first.stdout) == (0, "")
    path.write_text("edited")
    assert CliRunner().invoke(app, ["round", "init", "-o", str(path)]).exit_code == 2
    assert path.read_text() == "edited"


@pytest.mark.parametrize("words", [["--kind", "all"], ["--name", "a: b"]])
def test_a_wrong_word_is_refused(words: list[str]) -> None:
    assert CliRunner().invoke(app, ["round", "init", *words]).exit_code == 2
