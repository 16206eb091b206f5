"""The console as one ASGI application: routes, signing in, and what is said of what failed."""

import asyncio
import logging
from typing import Annotated, Any, Final

import grpc
from fastapi import FastAPI, Form, Request
from fastapi.responses import RedirectResponse, Response

from coordinator.console import audit, participants, results, rounds
from coordinator.console.desk import COOKIE, Desk, ForgedFormError, SignedOutError, admit
from coordinator.console.news import News
from coordinator.console.users import FOLDER
from coordinator.limits import Rates
from protos.config import ConfigError
from protos.errors import CATALOGUE, CofuseError
from web.guards import Guard
from web.pages import Assets
from web.tokens import secret_at

_LOG = logging.getLogger(__name__)
_S: Final = grpc.StatusCode
_HTTP: Final = {
    _S.NOT_FOUND: 404,
    _S.PERMISSION_DENIED: 403,
    _S.UNAUTHENTICATED: 401,
    _S.INVALID_ARGUMENT: 400,
    _S.FAILED_PRECONDITION: 409,
    _S.RESOURCE_EXHAUSTED: 429,
    _S.UNAVAILABLE: 503,
}
TRIES_PER_S: Final = 0.1
TRIES_BURST: Final = 10.0
"""Passwords that may be tried for one name, and in all ten times as many."""


def build(desk: Desk, news: News) -> Any:
    """The application, with its guard."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.desk, app.state.news = desk, news
    app.mount("/static", Assets(), name="static")
    for router in (rounds.router, results.router, participants.router, audit.router, news.router):
        app.include_router(router)
    _sign_in_routes(app, desk)
    if desk.config.console is not None and (provider := desk.config.console.oidc) is not None:
        try:
            from coordinator.console.sso import SingleSignOn
        except ImportError as error:
            raise ConfigError("[console.oidc] needs joserfc; install cofuse[oidc]") from error
        secret = secret_at(desk.config.data_dir / FOLDER / "session.key")
        app.include_router(SingleSignOn(desk, provider, secret).router)
    app.add_exception_handler(SignedOutError, _to_login)
    app.add_exception_handler(CofuseError, _refusal)
    app.add_exception_handler(ForgedFormError, _forged)
    app.add_exception_handler(404, _unknown)
    app.add_exception_handler(Exception, _fault)
    return Guard(app, hosts=desk.config.console.hosts if desk.config.console else ())


def _sign_in_routes(app: FastAPI, desk: Desk) -> None:
    turn = asyncio.Lock()  # argon2 takes 64 MiB for a moment: one password at a time
    tries = Rates(TRIES_PER_S, TRIES_BURST)
    all_tries = Rates(10 * TRIES_PER_S, 10 * TRIES_BURST)
    page = desk.login_page

    @app.get("/login")
    def login(after: str = "/") -> Response:
        return page(after=after)

    @app.post("/login")
    async def sign_in(
        name: Annotated[str, Form(max_length=40)],
        password: Annotated[str, Form(max_length=1000)],
        after: Annotated[str, Form(max_length=500)] = "/",
    ) -> Response:
        if not (tries.take(name) and all_tries.take("")):
            return page(429, "Too many tries. Wait ten seconds.", after)
        async with turn:
            user = await asyncio.to_thread(desk.users.verify, name, password)
        if user is None or desk.members.refusal(user.leaf) is not None:
            _LOG.warning("console: no sign-in for %r", name)
            return page(403, "Name and password do not fit.", after)
        return admit(desk, user, after)

    @app.post("/logout")
    def sign_out() -> Response:
        response = RedirectResponse("/login", 303)
        response.delete_cookie(COOKIE)
        return response


def _to_login(request: Request, _error: Exception) -> Response:
    after = request.url.path if request.method == "GET" else "/"
    return RedirectResponse(f"/login?after={after}", 303)


def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, CofuseError)
    entry = CATALOGUE[error.error_id]
    return _problem(request, _HTTP.get(entry.status, 500), error.says, entry.do, error.error_id)


def _forged(request: Request, _error: Exception) -> Response:
    return _problem(request, 403, "This form is too old, or not ours", "open the page again")


def _unknown(request: Request, _error: Exception) -> Response:
    return _problem(request, 404, f"There is no page {request.url.path}", "go to the rounds")


def _fault(request: Request, _error: Exception) -> Response:  # the server logs it
    return _problem(request, 500, "The coordinator made a mistake", "its log tells more")


def _problem(request: Request, status: int, says: str, do: str, error_id: str = "") -> Response:
    desk: Desk = request.app.state.desk
    return desk.pages.html("problem.html", status, says=says, do=do, error_id=error_id)
