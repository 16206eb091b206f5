"""Signing in by the organisation's own provider: two addresses, and one cookie for ten minutes."""

import logging
import time
from dataclasses import astuple
from typing import Final

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response
from itsdangerous import BadSignature, URLSafeTimedSerializer

from coordinator.config import OidcConfig
from coordinator.console import oidc
from coordinator.console.desk import Desk, admit

_LOG = logging.getLogger(__name__)
COOKIE: Final = "cofuse_sso"
_TRIAL_S: Final = 600
CALLBACK: Final = "/login/callback"


class SingleSignOn:
    """The provider of one console, and the attempts that are under way in browsers."""

    def __init__(self, desk: Desk, config: OidcConfig, secret: bytes) -> None:
        """Args: secret: signs the cookie of an attempt."""
        self._desk, self._config = desk, config
        self._trials = URLSafeTimedSerializer(secret, salt="sso")
        self.router = APIRouter()
        self.router.get("/login/sso")(self.begin)
        self.router.get(CALLBACK)(self.end)

    def begin(self, request: Request, after: str = "/") -> Response:
        """Send the browser to the provider."""
        trial = oidc.new_trial(after[:500])
        try:
            provider = self._provider()
        except oidc.OidcError as error:
            return self._refused(502, error)
        back = self._redirect(request)
        address = oidc.authorize_address(provider, self._config.client_id, back, trial)
        response = RedirectResponse(address, 303)
        cookie = str(self._trials.dumps(list(astuple(trial))))
        is_https = back.startswith("https:")
        response.set_cookie(
            COOKIE, cookie, _TRIAL_S, httponly=True, samesite="lax", secure=is_https, path="/login"
        )
        return response

    def end(self, request: Request, code: str = "", state: str = "") -> Response:
        """Take the browser back, with what the provider says of who sits there."""
        try:
            trial = self._trial(request, state)
            who = self._who(code, trial, self._redirect(request))
        except oidc.OidcError as error:
            return self._refused(403, error)
        user = self._desk.users.of_sso(who)
        if user is None or self._desk.members.refusal(user.leaf) is not None:
            return self._refused(403, oidc.OidcError(f"{who[:80]} may not sign in here"))
        response = admit(self._desk, user, trial.after)
        response.delete_cookie(COOKIE, path="/login")
        return response

    def _trial(self, request: Request, state: str) -> oidc.Trial:
        try:
            found = self._trials.loads(request.cookies.get(COOKIE, ""), max_age=_TRIAL_S)
        except BadSignature as error:
            raise oidc.OidcError("this attempt took too long, or began elsewhere") from error
        trial = oidc.Trial(*found)
        if not state or state != trial.state:
            raise oidc.OidcError("found an answer to another attempt")
        return trial

    def _who(self, code: str, trial: oidc.Trial, redirect: str) -> str:
        """Whom the provider names. Raises: OidcError."""
        config, provider = self._config, self._provider()
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect,
            "client_id": config.client_id,
            "code_verifier": trial.verifier,
        }
        secret = config.client_secret()
        basic = f"{config.client_id}:{secret}" if secret else ""
        token = str(oidc.fetch(provider.token, form, basic).get("id_token", ""))
        keys = oidc.fetch(provider.keys).get("keys") or []
        claims = oidc.claims_of(token, keys, provider, config.client_id)
        oidc.check_time(claims, trial.nonce, time.time())
        return oidc.subject_of(claims, config.claim)

    def _provider(self) -> oidc.Provider:
        """Asked each time: people sign in rarely, and providers move."""
        issuer = self._config.issuer
        return oidc.provider_of(issuer, oidc.fetch(oidc.discovery_address(issuer)))

    def _redirect(self, request: Request) -> str:
        console = self._desk.config.console
        origin = (console.origin if console else "") or str(request.base_url)
        return origin.rstrip("/") + CALLBACK

    def _refused(self, status: int, error: oidc.OidcError) -> Response:
        _LOG.warning("console: no sign-in by the provider: %s", error)
        says = f"Signing in did not work: {error}."
        return self._desk.login_page(status, says)
