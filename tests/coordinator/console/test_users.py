"""The file of users: who may sign in, and that it gives no password away."""

from pathlib import Path

import pytest

from coordinator.console.users import FILE, FOLDER, UserError, Users
from trust.identity import IdentityError


def test_a_password_is_kept_as_a_hash_in_a_file_of_ones_own(tmp_path: Path) -> None:
    users = Users(tmp_path)
    made = users.add("ada", "researcher", "correct horse battery")
    assert users.verify("ada", "correct horse battery") == made
    assert users.verify("ada", "correct horse batterY") is None
    assert users.verify("bob", "correct horse battery") is None
    path = tmp_path / FOLDER / FILE
    assert "horse" not in path.read_text()
    assert "$argon2id$" in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_short_passwords_and_bad_names_are_refused(tmp_path: Path) -> None:
    users = Users(tmp_path)
    with pytest.raises(UserError, match="12 at least"):
        users.add("ada", "researcher", "short")
    with pytest.raises(IdentityError):
        users.add("Ada Lovelace", "researcher", "correct horse battery")
    with pytest.raises(UserError, match="there are: none yet"):
        users.remove("ada")
    assert users.all() == []
