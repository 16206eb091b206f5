"""The page as an ASGI application. Whoever knows the link that was printed may use it."""

import hmac
import random
import secrets
import time
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import Depends, FastAPI, Form, Request
from fastapi.responses import RedirectResponse, Response

from participant import status
from participant.approvals import FOLDER as APPROVALS
from participant.approvals import ApprovalError, Approvals, Release, public_texts
from participant.budget import FILE as LEDGER
from participant.budget import Ledger, Standing
from participant.config import ParticipantConfig
from participant.egress import FOLDER as AUDIT
from participant.egress import Release as Left
from participant.egress import releases
from participant.policy import PolicyRefusalError, load_policy
from participant.status import read_status
from trust.audit_files import check, segments
from trust.chain import AuditError
from trust.keys import KeyFileError
from web.guards import Guard
from web.pages import Assets, Pages
from web.tokens import HOURS, Session, Sessions

COOKIE: Final = "cofuse_participant"
SAMPLES: Final = 10
"""Prompts that are shown of a release."""
MAX_LINES: Final = 300


class SignedOutError(Exception):
    """Whoever asks has not opened the link, or sends a form that is not of the page."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What the page has at hand."""

    config: ParticipantConfig
    by: str
    """Who decides here: the approver in the record."""
    key: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    """In the link; another one at each start."""
    sessions: Sessions = field(default_factory=lambda: Sessions(secrets.token_bytes(32)))
    pages: Pages = field(default_factory=lambda: Pages(Path(__file__).parent / "templates"))

    @property
    def approvals(self) -> Approvals:
        """Releases that wait, and decisions."""
        return Approvals(self.config.data_dir / APPROVALS)


def build(desk: Desk) -> Any:
    """The application, with its guard."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.state.desk = desk
    app.mount("/static", Assets(), name="static")
    app.add_exception_handler(SignedOutError, _locked)
    app.add_exception_handler(ApprovalError, _refused)
    app.get("/")(home)
    app.get("/releases/{release_id}")(one)
    app.post("/releases/{release_id}")(decide)
    app.post("/pause")(pause)
    app.post("/resume")(resume)
    app.post("/verify")(verify)
    return Guard(app)


async def signed_in(request: Request) -> Session:
    """The session of whoever asks; of a form, that it is ours.

    Raises: SignedOutError.
    """
    desk: Desk = request.app.state.desk
    session = desk.sessions.read(request.cookies.get(COOKIE, ""))
    if session is None:
        raise SignedOutError
    if request.method == "POST":
        form = await request.form()
        if not desk.sessions.is_own_form(session, str(form.get("form", ""))):
            raise SignedOutError
    return session


Signed = Annotated[Session, Depends(signed_in)]


async def home(request: Request, key: str = "") -> Response:
    """Everything at a glance; with the key of the link, the door to it."""
    desk: Desk = request.app.state.desk
    if key:
        if not hmac.compare_digest(key.encode(), desk.key.encode()):
            raise SignedOutError
        response = RedirectResponse("/", 303)
        cookie = desk.sessions.begin(desk.by, "")
        response.set_cookie(COOKIE, cookie, HOURS * 3600, httponly=True, samesite="lax")
        return response
    return _page(desk, await signed_in(request))


def one(request: Request, session: Signed, release_id: str) -> Response:
    """One release: all that an approver should know, and the decision."""
    desk: Desk = request.app.state.desk
    release = desk.approvals.find(release_id)
    used, limit, _ = _budget(desk)
    return desk.pages.html(
        "release.html",
        config=desk.config,
        token=desk.sessions.form_token(session),
        by=desk.by,
        release=release,
        before=max(0, used - release.positions),
        after=used,
        limit=limit,
        samples=_samples(desk, release),
    )


def decide(
    request: Request,
    _session: Signed,
    release_id: str,
    sha256: Annotated[str, Form(max_length=64)],
    decision: Annotated[str, Form(max_length=10)],
    why: Annotated[str, Form(max_length=500)] = "",
) -> Response:
    """Approve or refuse the bytes that were shown."""
    desk: Desk = request.app.state.desk
    release = desk.approvals.find(release_id)
    if release.sha256 != sha256:
        raise ApprovalError("found other bytes than were shown: look at the release again")
    is_yes = decision == "approve"
    if not is_yes and not why.strip():
        raise ApprovalError("found a refusal without a reason: say why, the submitter is told")
    desk.approvals.decide(release, approved=is_yes, by=desk.by, why="" if is_yes else why.strip())
    return RedirectResponse("/", 303)


def pause(request: Request, _session: Signed) -> Response:
    """Let no work be begun, and what runs stop at its next step."""
    status.pause(request.app.state.desk.config.data_dir)
    return RedirectResponse("/", 303)


def resume(request: Request, _session: Signed) -> Response:
    """Let work go on."""
    status.resume(request.app.state.desk.config.data_dir)
    return RedirectResponse("/", 303)


def verify(request: Request, session: Signed) -> Response:
    """Check the own audit chain as `cofuse audit verify` does."""
    desk: Desk = request.app.state.desk
    try:
        verdict = check(desk.config.data_dir / AUDIT)
    except (AuditError, KeyFileError, OSError) as error:
        return _page(desk, session, (False, str(error)))
    if verdict.broken is not None:
        return _page(desk, session, (False, f"record {verdict.broken.seq}: {verdict.broken.says}"))
    says = f"records 1 to {verdict.head.seq}, signed up to {verdict.signed}"
    return _page(desk, session, (True, says))


def _page(desk: Desk, session: Session, checked: tuple[bool, str] | None = None) -> Response:
    data = desk.config.data_dir
    trouble = ""
    try:
        left = _left(data, tuple(path.stat().st_size for path in segments(data / AUDIT)))
    except (AuditError, OSError) as error:
        left, trouble = (), f"the record of what left cannot be read: {error}"
    used, limit, fault = _budget(desk)
    by_round: dict[str, int] = {}
    for release in left:
        by_round[release.round] = by_round.get(release.round, 0) + release.size_bytes
    return desk.pages.html(
        "home.html",
        config=desk.config,
        token=desk.sessions.form_token(session),
        daemon=read_status(data),
        paused=status.paused(data),
        waiting=desk.approvals.waiting(),
        left=left[: -MAX_LINES - 1 : -1],
        total=sum(release.size_bytes for release in left),
        refused=sum(not release.allowed for release in left),
        by_round=list(by_round.items())[:-21:-1],
        used=used,
        limit=limit,
        now=time.time_ns() // 1_000_000,
        budget=_burn_down(desk),
        troubles=[words for words in (trouble, fault) if words],
        checked=checked,
    )


@lru_cache(2)
def _left(data: Path, _sizes: tuple[int, ...]) -> tuple[Left, ...]:
    """Everything that left and was refused; read again only when the files have grown."""
    return tuple(releases(data))


def _budget(desk: Desk) -> tuple[int, int | None, str]:
    """Positions of the last thirty days, how many are allowed (None: any), and what is wrong."""
    try:
        used = Ledger(desk.config.data_dir / LEDGER).used()
        return used, load_policy(desk.config.policy).logits.positions_per_30d, ""
    except PolicyRefusalError as error:
        return 0, 0, error.here


def _burn_down(desk: Desk) -> list[Standing]:
    try:
        return Ledger(desk.config.data_dir / LEDGER).burn_down()
    except PolicyRefusalError:
        return []  # _budget says what is wrong


def _samples(desk: Desk, release: Release) -> list[tuple[int, str]]:
    """Some of the public texts with their numbers, the same ones at each look."""
    texts = public_texts(desk.config.data_dir, release.round_id)
    some = random.Random(0).sample(range(len(texts)), min(SAMPLES, len(texts)))  # noqa: S311 - a sample, no secret
    return [(number + 1, texts[number][:300]) for number in sorted(some)]


def _locked(request: Request, _error: Exception) -> Response:
    says = "Open this page by the link that `cofuse participant page` printed"
    return request.app.state.desk.pages.html("problem.html", 403, says=says, do="start it again")  # type: ignore[no-any-return]


def _refused(request: Request, error: Exception) -> Response:
    return request.app.state.desk.pages.html("problem.html", 409, says=str(error), do="go back")  # type: ignore[no-any-return]
