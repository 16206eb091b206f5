"""What one's own files say about a handshake that fails."""

import shutil
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from trust.ca import create_authority, new_identity, sign_request
from trust.certificate_check import fault_of


def _member(folder: Path, authority: Path, name: str) -> Path:
    request = new_identity(folder / name, "researcher", name)
    signed = sign_request(authority, request, role="researcher", name=name, days=3)
    (folder / name / "certificate.pem").write_bytes(signed)
    shutil.copy(authority / "ca.pem", folder / name / "ca.pem")
    return folder / name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("members")
    for name in ("ours", "theirs"):
        create_authority(folder / name, name)
    _member(folder, folder / "ours", "ada")
    _member(folder, folder / "ours", "bob")
    _member(folder, folder / "theirs", "eve")
    return folder


def _copied(name: str) -> Callable[[Path, Path], object]:
    return lambda made, home: shutil.copy(made / name, home / Path(name).name)


@pytest.mark.parametrize(
    ("harm", "days", "says"),
    [
        (lambda made, home: None, 0, ""),
        (_copied("bob/certificate.pem"), 0, "was not made for"),
        (_copied("eve/ca.pem"), 0, "was not signed by"),
        (lambda made, home: (home / "key.pem").unlink(), 0, "cannot be read"),
        (lambda made, home: (home / "ca.pem").write_text("hello"), 0, "is no PEM file"),
        (lambda made, home: None, 4, "ask the operator for a new invitation"),
        (lambda made, home: None, -4, "set the clock"),
    ],
)
def test_the_fault_is_named_with_its_cure(
    made: Path, tmp_path: Path, harm: Callable[[Path, Path], object], days: int, says: str
) -> None:
    shutil.copytree(made / "ada", tmp_path, dirs_exist_ok=True)
    harm(made, tmp_path)
    files = (tmp_path / f"{name}.pem" for name in ("ca", "certificate", "key"))
    found = fault_of(*files, now=datetime.now(UTC) + timedelta(days=days))
    assert says in found
    assert bool(says) == bool(found)
