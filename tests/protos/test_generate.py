"""The committed stubs are those of the .proto files."""

from protos.generate import main


def test_the_stubs_are_fresh() -> None:
    assert main(["--check"]) == 0
