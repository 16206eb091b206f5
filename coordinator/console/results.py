"""The pages of what came out: evaluations and pivots."""

import csv
import io
import json
import tarfile
from collections.abc import Iterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends
from fastapi.responses import FileResponse, RedirectResponse, Response, StreamingResponse
from markupsafe import Markup

from coordinator.console import views
from coordinator.console.desk import Visit, may
from coordinator.console.queries import inputs
from coordinator.promotion import require_promoted
from coordinator.store import PivotRow
from protos.errors import CofuseError
from protos.v1 import research_pb2 as pb
from web.markdown import markdown

router = APIRouter()
Reader = Annotated[Visit, Depends(may("/cofuse.v1.Research/ListPivots"))]
Taker = Annotated[Visit, Depends(may("/cofuse.v1.Research/GetPivot", "/cofuse.v1.Transfer/Get"))]
Roller = Annotated[Visit, Depends(may("/cofuse.v1.Research/RollbackPivot"))]
_CHUNK_BYTES: Final = 1 << 20
MAX_CARD: Final = 200_000
MEASURES: Final = {
    "bpb": "Held-out bits per byte; lower is better",
    "accuracy": "Multiple-choice accuracy; higher is better",
    "letter": "Examination questions, by the likeliest letter; higher is better",
    "written": "Examination questions, by the letter it writes; higher is better",
    "preference": "Held-out pairs whose chosen answer it prefers; higher is better",
}


@router.get("/evals")
def evals(visit: Reader, pivot: str = "") -> Response:
    """The heat map of one pivot; default: the newest that was evaluated."""
    rows = visit.desk.store.pivots()
    scored = [row for row in rows if any(map(json.loads(row.evals_json).get, MEASURES))]
    newest = scored[-1] if scored else None
    row = visit.desk.store.pivot(pivot) if pivot else newest
    found: dict[str, Any] = json.loads(row.evals_json) if row else {}
    tables = [heat for name in MEASURES if (heat := views.heat(found, name)) is not None]
    trend = [(one, mean) for one in scored if (mean := views.own_mean(one)) is not None]
    return visit.html(
        "evals.html",
        pivot=row,
        scored=scored,
        tables=tables,
        measures=MEASURES,
        verdict=views.gates(found),
        credit=found.get("credit") or {},
        trend=trend,
    )


@router.get("/evals/{name}.json")
def evals_json(visit: Taker, name: str) -> Response:
    """The same as a file."""
    row = visit.desk.store.pivot(name)
    headers = {"content-disposition": f'attachment; filename="{row.name}-evals.json"'}
    return Response(row.evals_json, media_type="application/json", headers=headers)


@router.get("/evals/{name}.csv")
def evals_csv(visit: Taker, name: str) -> Response:
    """The same as a table: one line for each measure, model and domain."""
    row = visit.desk.store.pivot(name)
    found = json.loads(row.evals_json)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(("measure", "model", "domain", "value"))
    for measure in MEASURES:
        for model, scores in (found.get(measure) or {}).items():
            writer.writerows((measure, model, domain, value) for domain, value in scores.items())
    headers = {"content-disposition": f'attachment; filename="{row.name}-evals.csv"'}
    return Response(out.getvalue(), media_type="text/csv", headers=headers)


@router.get("/pivots")
def pivots(visit: Reader) -> Response:
    """All of them, and where each comes from."""
    store = visit.desk.store
    return visit.html("pivots.html", lines=views.lineage(store.pivots(), inputs(store)))


@router.get("/pivots/{name}.tar")
def archive(visit: Taker, name: str) -> Response:
    """All of its files, as a folder that transformers opens."""
    row = _pivot(visit, name)
    headers = {"content-disposition": f'attachment; filename="{row.name}.tar"'}
    return StreamingResponse(_tar(visit, row), media_type="application/x-tar", headers=headers)


@router.get("/pivots/{name}")
def one(visit: Taker, name: str) -> Response:
    """One pivot: its card, its files, who went in."""
    row = visit.desk.store.pivot(name)
    parts = visit.desk.store.contributions(row.round_id) if row.round_id else []
    newest = visit.desk.store.pivots()[-1].name
    return visit.html(
        "pivot.html",
        row=row,
        parts=[part for part in parts if part.status == "committed"],
        card=_card(visit, row),
        spec=json.loads(visit.desk.store.round(row.round_id).spec_json) if row.round_id else {},
        verdict=views.verdict(json.loads(row.evals_json)),
        size_bytes=sum(file.size_bytes for file in row.files),
        is_newest=newest == row.name,
        may_roll_back=visit.user.role == "operator" and bool(row.parent) and newest == row.name,
    )


@router.get("/pivots/{name}/files/{file}")
def download(visit: Taker, name: str, file: str) -> Response:
    """One of its files."""
    row = _pivot(visit, name)
    for known in row.files:
        if known.name == file:
            path = visit.desk.artifacts.path(known.sha256)
            return FileResponse(path, filename=known.name, media_type="application/octet-stream")
    raise CofuseError("unknown_artifact", f"{row.name} has no file {file[:80]!r}")


@router.post("/pivots/{name}/rollback")
def roll_back(visit: Roller, name: str) -> Response:
    """Publish its parent once more."""
    request = pb.RollbackPivotRequest(name=name)
    made = visit.desk.ask(visit.desk.research.RollbackPivot, request, visit.user)
    return RedirectResponse(f"/pivots/{made.name}", 303)


def _pivot(visit: Visit, name: str) -> PivotRow:
    """A pivot whose files this user may have: until it is promoted, operators alone may."""
    row = visit.desk.store.pivot(name)
    if visit.user.role != "operator":
        require_promoted(row)
    return row


def _card(visit: Visit, row: PivotRow) -> Markup:
    """README.md as it was published, without its front matter; "" when there is none."""
    found = next((file for file in row.files if file.name == "README.md"), None)
    if found is None:
        return Markup("")
    path = visit.desk.artifacts.path(found.sha256)
    text = path.read_text(encoding="utf-8", errors="replace")[:MAX_CARD]
    return markdown(text)


def _tar(visit: Visit, row: PivotRow) -> Iterator[bytes]:
    """A tar of the files, read as it is sent: it may be larger than memory and disk."""
    for file in row.files:
        head = tarfile.TarInfo(f"{row.name}/{file.name}")
        head.size, head.mtime, head.mode = file.size_bytes, row.created_unix_ms // 1000, 0o644
        yield head.tobuf(tarfile.PAX_FORMAT)
        with visit.desk.artifacts.path(file.sha256).open("rb") as source:
            while chunk := source.read(_CHUNK_BYTES):
                yield chunk
        yield bytes(-file.size_bytes % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
