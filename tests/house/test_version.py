"""One version: what a beat says of the software is what is installed."""

import tomllib
from pathlib import Path

from protos import VERSION


def test_the_version_of_a_beat_is_the_package_s() -> None:
    project = tomllib.loads(Path(__file__).parents[2].joinpath("pyproject.toml").read_text())
    assert project["project"]["version"] == VERSION
