"""The pages of rounds: the list with its timeline, and one round live."""

import json
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends
from fastapi.responses import RedirectResponse, Response

from coordinator.clock import now_unix_ms
from coordinator.console import queries, views
from coordinator.console.desk import Visit, may
from coordinator.rounds import FINAL, State
from coordinator.store import RoundRow, Store
from coordinator.why import Facts, explain, seen_of
from protos.v1 import research_pb2 as pb

router = APIRouter()
_READ: Final = "/cofuse.v1.Research"
Reader = Annotated[Visit, Depends(may(f"{_READ}/ListRounds"))]
OneReader = Annotated[Visit, Depends(may(f"{_READ}/GetRound", f"{_READ}/WatchRound"))]
Approver = Annotated[Visit, Depends(may(f"{_READ}/ApproveRound"))]
Canceller = Annotated[Visit, Depends(may(f"{_READ}/CancelRound"))]
MAX_LINES: Final = 500
FILTERS: Final = {
    "all": (),
    "open": tuple(state for state in State if state not in FINAL),
    "published": (State.PUBLISHED,),
    "ended badly": (State.FAILED, State.EXPIRED, State.REJECTED, State.CANCELLED),
}


@router.get("/")
def rounds(visit: Reader, show: str = "all") -> Response:
    """The list."""
    now = now_unix_ms()
    states = FILTERS.get(show, ())
    lines, total = queries.round_lines(visit.desk.store, now, states=states, limit=MAX_LINES)
    waiting = [line for line in lines if line.row.state is State.SUBMITTED]
    return visit.html(
        "rounds.html",
        lines=lines,
        total=total,
        waiting=waiting,
        now=now,
        show=show,
        filters=FILTERS,
    )


@router.get("/rounds/{round_id}")
def one(visit: OneReader, round_id: str) -> Response:
    """One round."""
    store, now = visit.desk.store, now_unix_ms()
    row = store.round(round_id)
    events, parts = store.events(round_id), store.contributions(round_id)
    changes = [
        (json.loads(e.body_json)["state"], e.time_unix_ms) for e in events if e.kind == "state"
    ]
    spans = queries.spans(changes, now)
    core = store.core(round_id)
    return visit.html(
        "round.html",
        row=row,
        spec=json.loads(row.spec_json),
        needed=core.needed,
        collect_until=core.collect_unix_ms,
        parts=parts,
        lanes=views.part_spans(parts, events, now),
        steps=views.steps_of(spans, row.state),
        curves=views.curves(events),
        story=views.story(events),
        gates=_gates(store, row),
        findings=findings(visit, round_id, row),
        is_final=row.state in FINAL,
        may_cancel=row.state not in FINAL
        and (visit.user.role == "operator" or row.submitted_by == visit.user.name),
        may_approve=row.state is State.SUBMITTED and visit.user.role == "operator",
        published=row.pivot_name if row.state is State.PUBLISHED else "",
        now=now,
    )


@router.post("/rounds/{round_id}/approve")
def approve(visit: Approver, round_id: str) -> Response:
    """Let a submitted round run."""
    visit.desk.ask(visit.desk.research.ApproveRound, _request(round_id), visit.user)
    return RedirectResponse(f"/rounds/{round_id}", 303)


@router.post("/rounds/{round_id}/cancel")
def cancel(visit: Canceller, round_id: str) -> Response:
    """End a round."""
    visit.desk.ask(visit.desk.research.CancelRound, _request(round_id), visit.user)
    return RedirectResponse(f"/rounds/{round_id}", 303)


def findings(visit: Visit, name: str, row: RoundRow | None = None) -> Any:
    """Why something is as it is (coordinator/why.py), from the rounds that matter: the open ones.

    Raises: CofuseError unknown_name.
    """
    store = visit.desk.store
    alarms = {who: anchor.alarm for who, anchor in store.anchors().items()}
    seen = seen_of(store.participants(), visit.desk.attending(), alarms)
    return explain(name, _facts(store, row, seen), now_unix_ms())


def _gates(store: Store, row: RoundRow) -> list[tuple[bool, str]]:
    """What the evaluation says of the pivot that a round has published."""
    if row.state is not State.PUBLISHED or not row.pivot_name:
        return []
    return views.gates(json.loads(store.pivot(row.pivot_name).evals_json))


def _facts(store: Store, row: RoundRow | None, seen: Any) -> Facts:
    ids = {one.round_id for one in store.rounds(active_only=True)}
    pivots = {}
    if row is not None:
        ids.add(row.round_id)
        pivots = {row.pivot_name: row.round_id} if row.pivot_name else {}
    rounds = [store.core(round_id) for round_id in sorted(ids)]
    return Facts(rounds=rounds, seen=seen, pivots=pivots, recurring=())


def _request(round_id: str) -> pb.RoundRequest:
    return pb.RoundRequest(round_id=round_id)
