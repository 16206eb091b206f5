"""The page of egress and audit: what came from whom, what was done by whom, and is the chain whole.

For operators: no call of the wire gives the chain away.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Final

from fastapi import APIRouter, Depends
from fastapi.responses import Response, StreamingResponse

from coordinator.audit import chain_of
from coordinator.console import queries
from coordinator.console.desk import Visit, operator
from protos.errors import CofuseError
from trust.chain import AuditError
from trust.keys import KeyFileError

router = APIRouter()
Operator = Annotated[Visit, Depends(operator)]
PAGE: Final = 200


@dataclass(frozen=True, slots=True)
class Check:
    """What reading the whole chain found."""

    ok: bool
    says: str


@router.get("/audit")
def audit(visit: Operator, before: int = 0) -> Response:
    """Receipts, heads of the participants' chains, and the newest records."""
    return _page(visit, before)


@router.post("/audit/verify")
def verify(visit: Operator) -> Response:
    """Read the whole chain, and say what it is worth."""
    return _page(visit, 0, check(visit))


@router.get("/audit.jsonl")
def export(visit: Operator) -> Response:
    """Every record as it was written."""
    headers = {"content-disposition": 'attachment; filename="audit.jsonl"'}
    return StreamingResponse(_lines(visit), media_type="application/jsonl", headers=headers)


def check(visit: Visit) -> Check:
    """Verify the chain of this coordinator as `cofuse audit verify` does."""
    try:
        with visit.desk.store.database.snapshot() as db:
            verdict = chain_of(db, visit.desk.config.data_dir).verify()
    except (AuditError, KeyFileError, OSError, CofuseError) as error:
        return Check(ok=False, says=str(error))
    if verdict.broken is not None:
        return Check(ok=False, says=str(verdict.broken))
    return Check(ok=True, says=f"records 1 to {verdict.head.seq}, signed up to {verdict.signed}")


def _page(visit: Visit, before: int, found: Check | None = None) -> Response:
    store = visit.desk.store
    receipts, totals = queries.receipts(store)
    records = queries.audit_tail(store, before=before, limit=PAGE)
    return visit.html(
        "audit.html",
        check=found,
        head=store.audit_head(),
        signed=store.signed_seq(),
        receipts=receipts,
        totals=sorted(totals.items(), key=lambda pair: -pair[1]),
        records=records,
        older=records[-1]["seq"] if records and records[-1]["seq"] > 1 else 0,
        is_newest=not before,
        anchors=store.anchors(),
    )


def _lines(visit: Visit) -> Iterator[bytes]:
    after = 0
    while found := queries.audit_lines(visit.desk.store, after):
        yield from (line.encode("utf-8", "replace") + b"\n" for _, line in found)
        after = found[-1][0]
