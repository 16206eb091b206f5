"""Invitations: each becomes one certificate, or none.

Which of the two, and why, is decided in the transaction that remembers it; two who redeem the same
token at the same moment take turns there.
"""

import hashlib
import hmac
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any, Final

from sqlalchemy import delete, insert, select, update

from coordinator.clock import now_unix_ms
from coordinator.config import CoordinatorConfig
from coordinator.database import Database
from coordinator.tables import INVITATIONS
from protos.errors import CofuseError
from trust.identity import Identity, checked_identity
from trust.tokens import Token, new_token, secret_sha256

MAX_WRONG_TRIES: Final = 5
"""After so many wrong secrets an invitation is locked, also for who knows the right one."""
AGAIN_MS: Final = 600_000
"""How long the same request gets its certificate again, in case the answer was lost."""
_KEPT_MS: Final = 30 * 24 * 3_600_000
"""How long an invitation is kept after its end, so that who comes late is told so."""


class Outcome(Enum):
    """What a try to redeem comes to."""

    ISSUE = auto()
    AGAIN = auto()
    WRONG = auto()
    EXPIRED = auto()
    USED = auto()
    LOCKED = auto()


_SAYS: Final = {
    Outcome.WRONG: "found no invitation with this number and secret",
    Outcome.EXPIRED: "this invitation has expired",
    Outcome.USED: "this invitation has been used",
    Outcome.LOCKED: f"this invitation is locked after {MAX_WRONG_TRIES} wrong secrets",
}


def join_words(config: CoordinatorConfig, role: str, token: str) -> str:
    """What somebody invited says, in a shell: the addresses are those that they can dial.

    Raises: protos.config.ConfigError when the server's certificate cannot be read.
    """
    words = f"cofuse join {config.reached_at(config.enroll_listen or '')} {token} FOLDER"
    if role != "participant":
        return words
    at, usual = config.reached_at(config.listen), CoordinatorConfig.model_fields["listen"].default
    elsewhere = at.rpartition(":")[2] != str(usual).rpartition(":")[2]
    return words + " --corpus NOTES.jsonl" + (f" --coordinator {at}" if elsewhere else "")


def judge(row: Mapping[str, Any], secret: str, request_sha256: str, now_ms: int) -> Outcome:
    """Decide about one try. Who does not know the secret learns nothing else."""
    if not hmac.compare_digest(row["secret_sha256"], secret_sha256(secret)):
        return Outcome.WRONG
    if row["wrong_tries"] >= MAX_WRONG_TRIES:
        return Outcome.LOCKED
    if row["used_unix_ms"]:
        same = row["request_sha256"] == request_sha256
        return Outcome.AGAIN if same and now_ms < row["used_unix_ms"] + AGAIN_MS else Outcome.USED
    return Outcome.ISSUE if now_ms < row["expires_unix_ms"] else Outcome.EXPIRED


class Invitations:
    """The invitations of one database."""

    def __init__(self, database: Database, *, clock_ms: Callable[[], int] = now_unix_ms) -> None:
        """Args: clock_ms: the time, UTC, in ms since 1970."""
        self._database = database
        self._clock_ms = clock_ms

    def invite(self, identity: Identity, authority: str, ttl_s: float) -> Token:
        """Make an invitation; its secret is in the token and nowhere else.

        Args: authority: fingerprint of the authority's certificate. ttl_s: how long it is good.
        """
        token, now = new_token(identity, authority), self._clock_ms()
        row = {
            "invitation": token.invitation,
            "secret_sha256": secret_sha256(token.secret),
            "role": identity.role,
            "name": identity.name,
            "created_unix_ms": now,
            "expires_unix_ms": now + int(ttl_s * 1000),
            "wrong_tries": 0,
            "used_unix_ms": 0,
            "request_sha256": "",
            "certificate_pem": "",
        }
        with self._database.write() as db:
            db.execute(delete(INVITATIONS).where(INVITATIONS.c.expires_unix_ms < now - _KEPT_MS))
            db.execute(insert(INVITATIONS).values(row))
        return token

    def redeem(
        self,
        invitation: str,
        secret: str,
        request: bytes,
        issue: Callable[[Identity, bytes], bytes],
    ) -> bytes:
        """Turn an invitation and a signing request into a certificate; at most once.

        Args: issue: makes the certificate for an identity and a request; when it raises, the
            invitation stays as it was.
        Returns: the certificate, in PEM; it is on disk before anybody hears of it.
        Raises: CofuseError bad_invitation. What issue raises.
        """
        key, now = INVITATIONS.c.invitation == invitation, self._clock_ms()
        digest, changes, pem = hashlib.sha256(request).hexdigest(), dict[str, Any](), b""
        with self._database.write() as db:
            row = db.execute(select(INVITATIONS).where(key)).mappings().first()
            found = judge(dict(row), secret, digest, now) if row else Outcome.WRONG
            if row and found is Outcome.WRONG:
                changes = {"wrong_tries": row["wrong_tries"] + 1}
            elif row and found is Outcome.AGAIN:
                pem = row["certificate_pem"].encode()
            elif row and found is Outcome.ISSUE:
                pem = issue(checked_identity(row["role"], row["name"]), request)
                changes = {"used_unix_ms": now, "request_sha256": digest}
                changes["certificate_pem"] = pem.decode()
            if changes:
                db.execute(update(INVITATIONS).where(key).values(changes))
        if found in _SAYS:
            raise CofuseError("bad_invitation", _SAYS[found])
        return pem
