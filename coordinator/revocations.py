"""Certificates that count no more: a durable list, kept in memory by whoever asks at every call.

The list only grows. `cofuse coordinator revoke` writes it from a process of its own, so the server
looks for news once a second (coordinator/admission.py).
"""

from collections.abc import Sequence
from typing import Final

from sqlalchemy import RowMapping, func, insert, select

from coordinator.clock import now_unix_ms
from coordinator.database import Database
from coordinator.tables import REVOCATIONS
from protos.errors import CofuseError
from protos.logs import logger
from trust.identity import Identity, Leaf

_LOG = logger(__name__)
_MAX_WHY: Final = 500


class Revocations:
    """The list of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known = 0
        self._serials: frozenset[int] = frozenset()
        self._subjects: dict[str, int] = {}
        self._stale = False

    def revokes(self, leaf: Leaf) -> bool:
        """Whether a certificate is on the list, as it was at the last refresh."""
        if leaf.serial in self._serials:
            return True
        # A certificate knows whole seconds only. One made in the very second of the revocation
        # counts as older: better a certificate too few.
        until_unix_ms = self._subjects.get(_subject(leaf.identity), -1)
        return leaf.issued_unix_s * 1000 <= until_unix_ms

    def refresh(self) -> None:
        """Read what is new. While the database cannot be read, what is known stays in force."""
        try:
            with self._database.read() as db:
                count = db.scalar(select(func.count()).select_from(REVOCATIONS)) or 0
                if count != self._known:
                    self._take(db.execute(select(REVOCATIONS)).mappings().all())
            self._stale = False
        except CofuseError as error:
            if not self._stale:
                _LOG.error("revocations.unread", says=str(error))
            self._stale = True

    def revoke_all_of(self, identity: Identity, why: str) -> None:
        """Revoke every certificate of an identity made up to now; a later one counts again."""
        self._add(_subject(identity), "", why)

    def revoke_one(self, serial: int, why: str) -> None:
        """Revoke one certificate. Repeating changes nothing."""
        if serial not in self._serials:
            self._add("", str(serial), why)

    def _add(self, subject: str, serial: str, why: str) -> None:
        row = {"subject": subject, "serial": serial, "why": why[:_MAX_WHY]}
        with self._database.write() as db:
            db.execute(insert(REVOCATIONS).values({**row, "revoked_unix_ms": now_unix_ms()}))
        self.refresh()

    def _take(self, rows: Sequence[RowMapping]) -> None:
        subjects: dict[str, int] = {}
        for row in rows:
            if subject := row["subject"]:
                subjects[subject] = max(row["revoked_unix_ms"], subjects.get(subject, -1))
        self._serials = frozenset(int(row["serial"]) for row in rows if row["serial"])
        self._subjects, self._known = subjects, len(rows)


def _subject(identity: Identity) -> str:
    return f"{identity.role}/{identity.name}"
