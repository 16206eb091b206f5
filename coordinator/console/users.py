"""Who may sign in: one file of names, roles and argon2 hashes beside the database.

A user stands for the identity cofuse://role/name, as a certificate would: what they do is recorded
under it, and revoking that identity ends their sessions.
"""

import hashlib
import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Final, Literal

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError
from pydantic import BaseModel, ConfigDict, TypeAdapter

from coordinator.clock import now_unix_ms
from protos.files import replace
from trust.identity import Identity, Leaf, checked_name

FOLDER: Final = "console"
FILE: Final = "users.json"
MIN_PASSWORD: Final = 12
NO_PASSWORD: Final = "none"  # noqa: S105 - that there is none
"""Which no password fits."""
ConsoleRole = Literal["researcher", "operator"]


class UserError(ValueError):
    """A user that cannot be; the message says what to do."""


class User(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    role: ConsoleRole
    password: str
    """argon2id, with its salt and parameters."""
    made_unix_ms: int
    sso: str = ""
    """What the provider calls this person; empty: they sign in by password alone."""

    @property
    def identity(self) -> Identity:
        """Who this is in the audit chain."""
        return Identity(self.role, self.name)

    @property
    def leaf(self) -> Leaf:
        """As the door's rules see it: a certificate made when the password was."""
        issued = self.made_unix_ms / 1000
        return Leaf(self.identity, serial=0, issued_unix_s=issued, ends_unix_s=1e12, calls=True)

    @property
    def stamp(self) -> str:
        """Changes with the password, and with the name at the provider."""
        return hashlib.sha256(f"{self.password}{self.sso}".encode()).hexdigest()[:16]


_USERS: Final = TypeAdapter(list[User])


class Users:
    """The users of one coordinator's data folder; read anew at each look."""

    def __init__(self, data_dir: Path, *, clock_ms: Callable[[], int] = now_unix_ms) -> None:
        """Args: clock_ms: UTC, in ms since 1970."""
        self._path = data_dir / FOLDER / FILE
        self._clock_ms = clock_ms
        self._hasher = PasswordHasher()

    def all(self) -> list[User]:
        """Everybody, by name."""
        return _USERS.validate_json(self._path.read_bytes()) if self._path.exists() else []

    def get(self, name: str) -> User | None:
        """One of them."""
        return next((user for user in self.all() if user.name == name), None)

    def of_sso(self, said: str) -> User | None:
        """Whom the provider means."""
        return next((user for user in self.all() if said and user.sso == said), None)

    def add(self, name: str, role: ConsoleRole, password: str, *, sso: str = "") -> User:
        """Let somebody in, or give them another password, which ends their sessions.

        Args: password: empty with `sso`: they sign in by the provider alone.
        Raises: UserError, IdentityError, OSError.
        """
        if (other := self.of_sso(sso)) is not None and other.name != name:
            raise UserError(f"found {sso[:80]!r} with {other.name} already, wanted one person each")
        if len(password) < MIN_PASSWORD and not (sso and not password):
            raise UserError(
                f"found a password of {len(password)} characters, wanted {MIN_PASSWORD} at least: "
                "four random words will do"
            )
        user = User(
            name=checked_name(name),
            role=role,
            password=self._hasher.hash(password) if password else NO_PASSWORD,
            made_unix_ms=self._clock_ms(),
            sso=sso,
        )
        self._save([*(one for one in self.all() if one.name != name), user])
        return user

    def remove(self, name: str) -> None:
        """Let somebody in no more; their sessions end. Raises: UserError, OSError."""
        left = [user for user in self.all() if user.name != name]
        if len(left) == len(self.all()):
            names = ", ".join(user.name for user in left) or "none yet"
            raise UserError(f"found no user {name[:40]!r}; there are: {names}")
        self._save(left)

    def verify(self, name: str, password: str) -> User | None:
        """The user of a name and a password; takes as long when there is none. Some 50 ms."""
        user = self.get(name)
        known = user if user is not None and user.password != NO_PASSWORD else None
        try:
            self._hasher.verify(known.password if known else self._nobodys, password)
        except (Argon2Error, InvalidHashError):
            return None
        return known

    @cached_property
    def _nobodys(self) -> str:
        return self._hasher.hash("nobody's")

    def _save(self, users: list[User]) -> None:
        rows = [user.model_dump() for user in sorted(users, key=lambda user: user.name)]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        draft = self._path.with_suffix(".new")
        draft.unlink(missing_ok=True)
        with open(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
            json.dump(rows, file, indent=1)
        replace(draft, self._path)
