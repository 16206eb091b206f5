"""The pages of participants: how each is, who is invited, and who is here no more."""

from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import APIRouter, Depends, Form
from fastapi.responses import RedirectResponse, Response

from coordinator.clock import now_unix_ms
from coordinator.console import queries, views
from coordinator.console.desk import Desk, Visit, may, operator
from coordinator.console.rounds import findings
from coordinator.invitations import join_words
from coordinator.presence import Seen
from protos.errors import CofuseError
from trust.identity import Identity, IdentityError, checked_identity, fingerprint

router = APIRouter()
Reader = Annotated[Visit, Depends(may("/cofuse.v1.Research/ListParticipants"))]
Asker = Annotated[Visit, Depends(may("/cofuse.v1.Research/Why"))]
Operator = Annotated[Visit, Depends(operator)]
MONTH_MS: Final = 30 * 24 * 3600 * 1000
"""The window over which policies count what leaves."""
HOURS: Final = {"1": "one hour", "24": "one day", "168": "one week"}
INVITED: Final = ("participant", "researcher", "operator")


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One participant in the list."""

    name: str
    state: str
    """online, paused, offline or alarm."""
    joined_unix_ms: int
    seen: Seen | None
    expert_unix_ms: int
    certificate_unix_ms: int
    """0: not known."""
    alarm: str


@router.get("/participants")
def participants(visit: Reader) -> Response:
    """Everybody who joined; invitations and revocations for an operator."""
    desk, now = visit.desk, now_unix_ms()
    is_operator = visit.user.role == "operator"
    return visit.html(
        "participants.html",
        lines=lines(desk),
        now=now,
        invitations=queries.open_invitations(desk.store, now) if is_operator else [],
        revocations=queries.revocation_list(desk.store) if is_operator else [],
        enroll=desk.config.enroll_listen,
        hours=HOURS,
        roles=INVITED,
    )


@router.get("/participants/{name}")
def one(visit: Asker, name: str) -> Response:
    """Why a participant is as it is, with the remedy."""
    found = {line.name: line for line in lines(visit.desk)}
    if name not in found:
        raise CofuseError("unknown_participant", f"nobody joined as {name[:40]!r}")
    now = now_unix_ms()
    return visit.html(
        "participant.html",
        line=found[name],
        findings=findings(visit, name),
        released=views.running_total(queries.released(visit.desk.store, name, now - MONTH_MS)),
        since=max(now - MONTH_MS, found[name].joined_unix_ms),
        now=now,
    )


@router.post("/participants/invite")
def invite(
    visit: Operator,
    role: Annotated[str, Form(max_length=20)],
    name: Annotated[str, Form(max_length=60)],
    hours: Annotated[str, Form(max_length=4)] = "1",
) -> Response:
    """Make an invitation; its token is shown once, and kept nowhere."""
    config = visit.desk.config
    if config.enroll_listen is None:
        raise CofuseError("no_authority", "found no enroll_listen, where tokens are redeemed")
    identity = _identity(role, name)
    if role not in INVITED or hours not in HOURS:
        raise CofuseError("bad_request", f"found {role[:20]!r} for {hours} h, wanted a choice")
    authority = fingerprint(config.tls.ca.read_bytes())
    token = visit.desk.invitations.invite(identity, authority, int(hours) * 3600)
    return visit.html(
        "invited.html",
        identity=identity,
        words=join_words(config, role, str(token)),
        lasts=HOURS[hours],
        authority=authority,
    )


@router.post("/participants/revoke")
def revoke(
    visit: Operator,
    role: Annotated[str, Form(max_length=20)],
    name: Annotated[str, Form(max_length=60)],
    why: Annotated[str, Form(max_length=500)] = "",
) -> Response:
    """Let an identity's certificates, and its sessions here, count no more."""
    said = f"{why or 'no reason given'} (by {visit.user.identity.uri}, in the console)"
    visit.desk.revocations.revoke_all_of(_identity(role, name), said)
    return RedirectResponse("/participants", 303)


def lines(desk: Desk) -> list[Line]:
    """Everybody who joined, by name, those in trouble first."""
    attending, anchors = desk.attending(), desk.store.anchors()
    experts, ends = queries.experts(desk.store), queries.certificate_ends(desk.store)
    found = []
    for name, row in desk.store.participants().items():
        seen = attending.get(name)
        alarm = anchors[name].alarm if name in anchors else ""
        state = "online" if name in attending else "offline"
        if seen is not None and seen.paused:
            state = "paused"
        known = int(seen.certificate_ends_unix_s * 1000) if seen else 0
        found.append(
            Line(
                name=name,
                state="alarm" if alarm else state,
                joined_unix_ms=row.joined_unix_ms,
                seen=seen,
                expert_unix_ms=experts.get(name, 0),
                certificate_unix_ms=known or ends.get(f"participant/{name}", 0),
                alarm=alarm,
            )
        )
    order = ("alarm", "offline", "paused", "online")
    return sorted(found, key=lambda line: (order.index(line.state), line.name))


def _identity(role: str, name: str) -> Identity:
    try:
        return checked_identity(role, name)
    except IdentityError as error:
        raise CofuseError("bad_request", str(error)) from error
