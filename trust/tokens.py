"""A join token: what an operator gives to somebody who is to get a certificate, once.

cofuse1.<role>.<name>.<invitation>.<secret>.<sha256 of the authority's certificate>

The fingerprint lets the joining side know the right authority before it says the secret; nothing
is trusted at first sight. The coordinator keeps the secret's hash only.
"""

import hashlib
import re
import secrets
from dataclasses import dataclass
from typing import Final

from trust.identity import Identity, IdentityError, checked_identity

_FORM: Final = re.compile(
    r"cofuse1\.([a-z]+)\.([a-z0-9-]{1,40})\.([0-9a-f]{16})\.([A-Za-z0-9_-]{32})\.([0-9a-f]{64})"
)


@dataclass(frozen=True, slots=True)
class Token:
    """A parsed token."""

    identity: Identity
    invitation: str
    """Which invitation: 16 hexadecimal digits."""
    secret: str
    """192 random bits as 32 characters."""
    authority: str
    """Fingerprint of the authority's certificate, as trust.identity.fingerprint gives it."""

    def __str__(self) -> str:
        """The token as it is handed over."""
        parts = (self.identity.role, self.identity.name, self.invitation, self.secret)
        return ".".join(("cofuse1", *parts, self.authority))

    def __repr__(self) -> str:
        """Without the secret: this is what a log or a traceback would show."""
        return f"Token({self.identity.uri}, {self.invitation})"


def new_token(identity: Identity, authority: str) -> Token:
    """Draw an invitation's number and secret."""
    return Token(identity, secrets.token_hex(8), secrets.token_urlsafe(24), authority)


def parse_token(text: str) -> Token:
    """Read a token.

    Raises: IdentityError when it is none; the message does not repeat it.
    """
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise IdentityError(
            "found a text that is no join token, wanted cofuse1.<role>.<name>. and three more "
            "parts: copy the whole line that `cofuse coordinator invite` printed"
        )
    role, name, invitation, secret, authority = match.groups()
    return Token(checked_identity(role, name), invitation, secret, authority)


def secret_sha256(secret: str) -> str:
    """What is kept of a secret. It is random and long, so a plain hash gives nothing away."""
    return hashlib.sha256(secret.encode()).hexdigest()
