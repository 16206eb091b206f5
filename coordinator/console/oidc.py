"""OpenID Connect as the console needs it: the code flow with PKCE, and what an ID token is worth.

joserfc checks signatures and claims (the extra `oidc`). Pure but for `fetch`.
Source: OpenID Connect Core 1.0 (3.1), RFC 7636 (PKCE), RFC 7517 (keys).
"""

import base64
import hashlib
import json
import secrets
import ssl
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final
from urllib.error import HTTPError
from urllib.parse import urlencode, urlsplit
from urllib.request import HTTPRedirectHandler, HTTPSHandler, Request, build_opener

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import KeySet, import_key
from joserfc.jwt import ClaimsOption

SKEW_S: Final = 60
"""How far the provider's clock may be from ours."""
_TIMEOUT_S: Final = 10.0
_MOST_BYTES: Final = 256 * 1024
_WELL_KNOWN: Final = "/.well-known/openid-configuration"
_ALGORITHMS: Final = ("RS256", "ES256")


class OidcError(ValueError):
    """The provider did not vouch for anybody; the message says what was found."""


@dataclass(frozen=True, slots=True)
class Provider:
    """Where an issuer answers."""

    issuer: str
    authorize: str
    token: str
    keys: str


@dataclass(frozen=True, slots=True)
class Trial:
    """One attempt to sign in, kept by the browser that makes it."""

    state: str
    nonce: str
    verifier: str
    after: str
    """Where they wanted to go."""


def new_trial(after: str) -> Trial:
    """Draw the secrets of an attempt."""
    state, nonce, verifier = (secrets.token_urlsafe(32) for _ in range(3))
    return Trial(state, nonce, verifier, after)


def provider_of(issuer: str, found: Mapping[str, Any]) -> Provider:
    """Read a discovery document. Raises: OidcError."""
    if found.get("issuer") != issuer:
        raise OidcError(f"found the issuer {found.get('issuer')!r:.80}, wanted {issuer!r}")
    names = ("authorization_endpoint", "token_endpoint", "jwks_uri")
    addresses = [secure_url(str(found.get(name, ""))) for name in names]
    return Provider(issuer, *addresses)


def discovery_address(issuer: str) -> str:
    """Where an issuer describes itself."""
    return issuer.rstrip("/") + _WELL_KNOWN


def secure_url(url: str) -> str:
    """An https address, or one of this machine. Raises: OidcError."""
    parts = urlsplit(url)
    is_here = parts.hostname in ("localhost", "127.0.0.1") and parts.scheme == "http"
    if not parts.hostname or not (parts.scheme == "https" or is_here):
        raise OidcError(f"found the address {url[:80]!r}, wanted https")
    return url


def authorize_address(provider: Provider, client_id: str, redirect: str, trial: Trial) -> str:
    """Where the browser is sent."""
    challenge = hashlib.sha256(trial.verifier.encode()).digest()
    asked = {
        "response_type": "code",
        "client_id": client_id,
        "redirect_uri": redirect,
        "scope": "openid email profile",
        "state": trial.state,
        "nonce": trial.nonce,
        "code_challenge": base64.urlsafe_b64encode(challenge).rstrip(b"=").decode(),
        "code_challenge_method": "S256",
    }
    joint = "&" if urlsplit(provider.authorize).query else "?"
    return f"{provider.authorize}{joint}{urlencode(asked)}"


def claims_of(
    token: str, keys: Sequence[Mapping[str, Any]], provider: Provider, client_id: str
) -> dict[str, Any]:
    """The claims of an ID token that one of the keys has signed, for us. Time is `check_time`'s.

    Raises: OidcError.
    """
    try:
        # RSA and P-256 only: `none`, or a secret that a public key is taken for, never counts.
        claims = jwt.decode(token, _known(keys), algorithms=list(_ALGORITHMS)).claims
        ours: ClaimsOption = {"essential": True, "value": client_id}
        issued: ClaimsOption = {"essential": True, "value": provider.issuer}
        azp: ClaimsOption = {"value": client_id}
        jwt.JWTClaimsRegistry(0, iss=issued, aud=ours, azp=azp).validate(_timeless(claims))
    except (JoseError, ValueError) as error:
        raise OidcError(
            "found an ID token that none of the provider's keys has signed for this client"
        ) from error
    return claims


def _known(keys: Sequence[Mapping[str, Any]]) -> KeySet:
    """Those of the provider's keys that we take; it may have others for other ends."""
    found = []
    for key in keys:
        with suppress(JoseError, ValueError):
            found.append(import_key(dict(key)))
    return KeySet(found)


def _timeless(claims: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in claims.items() if name not in ("exp", "iat", "nbf")}


def check_time(claims: Mapping[str, Any], nonce: str, now_unix_s: float) -> None:
    """Hold claims to this attempt and this moment. Raises: OidcError."""
    time: ClaimsOption = {"essential": True}
    attempt: ClaimsOption = {"essential": True, "value": nonce}
    checks = jwt.JWTClaimsRegistry(int(now_unix_s), SKEW_S, exp=time, iat=time, nonce=attempt)
    try:
        checks.validate(dict(claims))
    except JoseError as error:
        raise OidcError(
            f"found an ID token that is over, not yet good, or of another attempt ({error}): "
            "compare the clocks and try again"
        ) from error


def subject_of(claims: Mapping[str, Any], claim: str) -> str:
    """Who it is, by one claim. Raises: OidcError."""
    found = claims.get(claim)
    if not isinstance(found, str) or not found:
        raise OidcError(f"found no claim {claim!r} in the ID token")
    if claim == "email" and claims.get("email_verified") is not True:
        raise OidcError("found an e-mail address that the provider has not verified")
    return found


def fetch(url: str, form: Mapping[str, str] | None = None, basic: str = "") -> dict[str, Any]:
    """Ask the provider, and read its JSON. No redirect is followed.

    Args: form: POSTed when given. basic: "name:secret" of the client.
    Raises: OidcError.
    """
    request = Request(secure_url(url), headers={"accept": "application/json"})  # noqa: S310
    if form is not None:
        request.data = urlencode(form).encode()
    if basic:
        coded = base64.b64encode(basic.encode()).decode()
        request.add_header("authorization", f"Basic {coded}")
    opener = build_opener(HTTPSHandler(context=ssl.create_default_context()), _NoRedirect())
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            found = json.loads(answer.read(_MOST_BYTES))
    except HTTPError as error:
        raise OidcError(f"{urlsplit(url).netloc} answered with status {error.code}") from error
    except (OSError, ValueError) as error:
        raise OidcError(f"{urlsplit(url).netloc} gave no answer that can be read") from error
    if not isinstance(found, dict):
        raise OidcError(f"{urlsplit(url).netloc} gave an answer that is no object")
    return found


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *_args: Any, **_more: Any) -> None:
        """None: the answer itself becomes an error."""
