"""What the console's pages have at hand, and how they ask: as a caller of the gRPC services.

A page asks the services' own handlers, or reads the store after the same admission, so that a
right, a limit or a revocation that holds at the wire holds here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse

from coordinator.admission import Members
from coordinator.artifacts import Artifacts
from coordinator.config import CoordinatorConfig
from coordinator.console.users import FOLDER, User, Users
from coordinator.invitations import Invitations
from coordinator.presence import Seen
from coordinator.research_service import ResearchService
from coordinator.revocations import Revocations
from coordinator.store import Store
from protos.errors import CofuseError
from trust.identity import Leaf
from web.pages import Pages
from web.tokens import HOURS, Session, Sessions, secret_at

COOKIE = "cofuse_session"
_Request = TypeVar("_Request")
_Reply = TypeVar("_Reply")


class SignedOutError(Exception):
    """Nobody has signed in, or not any more."""


class ForgedFormError(Exception):
    """A form that was not made for this session."""


class _EndedError(Exception):
    """A handler has ended its call; the cause tells why."""


@dataclass(frozen=True, slots=True)
class ConsoleCall:
    """What a handler of a service may ask of its call, when a page makes it."""

    leaf: Leaf

    def is_active(self) -> bool:
        """Whether anybody still waits."""
        return True

    def peer(self) -> str:
        """Where the caller is."""
        return "console"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """None was sent."""
        return ()

    def set_trailing_metadata(self, trailing: object) -> None:
        """The error itself says its id."""

    def abort(self, code: object, details: str) -> NoReturn:
        """End the call."""
        raise _EndedError(details)


@dataclass(frozen=True, slots=True, kw_only=True)
class Desk:
    """Everything behind the pages."""

    config: CoordinatorConfig
    store: Store
    artifacts: Artifacts
    research: ResearchService
    attending: Callable[[], Mapping[str, Seen | None]]
    members: Members
    """A door of the console's own: its limits count apart from the wire's."""
    users: Users = field(init=False)
    sessions: Sessions = field(init=False)
    pages: Pages = field(init=False)
    invitations: Invitations = field(init=False)
    revocations: Revocations = field(init=False)

    def __post_init__(self) -> None:
        home = self.config.data_dir / FOLDER
        made: dict[str, Any] = {
            "users": Users(self.config.data_dir),
            "sessions": Sessions(secret_at(home / "session.key")),
            "pages": Pages(Path(__file__).parent / "templates"),
            "invitations": Invitations(self.store.database),
            "revocations": Revocations(self.store.database),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    def ask(
        self, handler: Callable[[_Request, Any], _Reply], request: _Request, user: User
    ) -> _Reply:
        """Let a service's handler answer, as it would on the wire.

        Raises: CofuseError.
        """
        try:
            return handler(request, ConsoleCall(user.leaf))
        except _EndedError as ended:
            cause = ended.__cause__
            raise cause if isinstance(cause, CofuseError) else ended from None

    def login_page(self, status: int = 200, says: str = "", after: str = "/") -> HTMLResponse:
        """Where people sign in."""
        empty = not self.users.all()
        sso = self.config.console.oidc if self.config.console else None
        named = urlsplit(sso.issuer).hostname if sso else ""
        return self.pages.html(
            "login.html", status, says=says, after=after, empty=empty, provider=named
        )


def admit(desk: Desk, user: User, after: str) -> RedirectResponse:
    """Begin a session of somebody who has shown who they are, and send them on."""
    # Only a path of ours: "//host" and "/\\host" are addresses of others.
    inside = after.startswith("/") and after[1:2] not in ("/", "\\")
    response = RedirectResponse(after if inside else "/", 303)
    cookie = desk.sessions.begin(user.name, user.stamp)
    is_https = desk.config.console is not None and desk.config.console.is_https
    response.set_cookie(
        COOKIE, cookie, HOURS * 3600, httponly=True, samesite="lax", secure=is_https
    )
    return response


@dataclass(frozen=True, slots=True)
class Visit:
    """One request of somebody who has signed in and may make it."""

    desk: Desk
    user: User
    session: Session
    path: str

    def html(self, name: str, **values: Any) -> HTMLResponse:
        """A page with what every page has: who looks, and the token for its forms."""
        token = self.desk.sessions.form_token(self.session)
        return self.desk.pages.html(name, user=self.user, token=token, path=self.path, **values)


def signed_in(request: Request) -> Visit:
    """Who asks.

    Raises: SignedOutError; CofuseError revoked.
    """
    desk: Desk = request.app.state.desk
    session = desk.sessions.read(request.cookies.get(COOKIE, ""))
    user = desk.users.get(session.name) if session is not None else None
    if session is None or user is None or user.stamp != session.stamp:
        raise SignedOutError
    if (refusal := desk.members.refusal(user.leaf)) is not None:
        raise refusal
    return Visit(desk, user, session, request.url.path)


def may(*methods: str) -> Callable[[Request], Any]:
    """A dependency: whoever may make these calls (coordinator/access.py) may have the page."""

    # Asynchronous, so that the limits are counted in the event loop alone.
    async def admitted(request: Request) -> Visit:
        visit = signed_in(request)
        for method in methods:
            visit.desk.members.admit(method, ConsoleCall(visit.user.leaf))
        await _own_form(request, visit)
        return visit

    return admitted


async def operator(request: Request) -> Visit:
    """A dependency: for what the command line on the coordinator's machine does besides."""
    visit = signed_in(request)
    if visit.user.role != "operator":
        raise CofuseError("not_allowed", f"{request.url.path} is for operators")
    await _own_form(request, visit)
    return visit


async def _own_form(request: Request, visit: Visit) -> None:
    if request.method == "POST":
        form = await request.form()
        if not visit.desk.sessions.is_own_form(visit.session, str(form.get("form", ""))):
            raise ForgedFormError
