"""Cookies and form tokens: signed, limited in time, tied to each other."""

import hmac
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from itsdangerous import BadSignature, URLSafeTimedSerializer

HOURS: Final = 12
"""How long a session lasts, whatever is done in it."""
_KEY_BYTES: Final = 32


def secret_at(path: Path) -> bytes:
    """The secret of a folder, made at the first call: mode 0600.

    Removing the file ends every session. Raises: OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(handle, "wb") as file:
        file.write(secrets.token_bytes(_KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    return path.read_bytes()


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who has signed in."""

    name: str
    stamp: str
    """Of the password it was begun with: another password ends it."""
    nonce: str


class Sessions:
    """Makes and reads what a browser keeps for us."""

    def __init__(self, secret: bytes) -> None:
        self._cookies = URLSafeTimedSerializer(secret, salt="session")
        self._forms = URLSafeTimedSerializer(secret, salt="form")

    def begin(self, name: str, stamp: str) -> str:
        """The cookie of a new session."""
        return str(self._cookies.dumps([name, stamp, secrets.token_urlsafe(12)]))

    def read(self, cookie: str) -> Session | None:
        """The session of a cookie; None when it is none, or over."""
        found = _loaded(self._cookies, cookie)
        is_ours = isinstance(found, list) and [type(x) for x in found] == [str, str, str]
        return Session(*found) if is_ours else None

    def form_token(self, session: Session) -> str:
        """What a form of this session carries."""
        return str(self._forms.dumps(session.nonce))

    def is_own_form(self, session: Session, token: str) -> bool:
        """Whether a form was made for this session."""
        return hmac.compare_digest(str(_loaded(self._forms, token)), session.nonce)


def _loaded(serializer: URLSafeTimedSerializer, text: str) -> Any:
    try:
        return serializer.loads(text, max_age=HOURS * 3600)
    except BadSignature:  # expired ones too
        return None
