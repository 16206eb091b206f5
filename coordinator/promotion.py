"""Whether a pivot may be used yet: so many operators have signed a yes to exactly its content.

Until then operators alone may read it, and no round starts from it. How many are needed is settled
when the pivot is published; who imports a pivot or goes back to an old one has said yes with that.
"""

import json
from collections.abc import Mapping
from typing import Final

from sqlalchemy import select, update

from coordinator.audit import record
from coordinator.database import Database
from coordinator.queries import pivot_row
from coordinator.store import Store
from coordinator.tables import PIVOTS, PivotRow
from protos.errors import CofuseError
from trust.chain import Entry
from trust.identity import Identity
from trust.pivot_manifest import Manifest
from trust.statements import Promotion

NEEDED: Final[Mapping[str, int]] = {"auto": 0, "one": 1, "two": 2}
"""By `promotion` of coordinator.toml."""


def promote(
    store: Store,
    manifest: Manifest | None,
    promotion: Promotion,
    by: Identity,
    raw: str,
) -> PivotRow:
    """Keep an operator's yes, and record it; repeating changes nothing.

    Args: manifest: what was signed of the pivot. raw: the promotion as it was signed.
    Raises: CofuseError bad_request when the yes is to something else, own_round when the only yes
        would be its submitter's, wrong_state when the pivot waits for none.
    """
    row = store.pivot(promotion.pivot)
    if manifest is None or promotion.sha256 != manifest.content_sha256:
        says = f"found a yes to content {promotion.sha256[:16]}, which is not that of {row.name}"
        raise CofuseError("bad_request", says)
    if not row.promotions_needed:
        raise CofuseError("wrong_state", f"{row.name} waits for nobody's yes")
    submitter = store.round(row.round_id).submitted_by if row.round_id else ""
    if row.promotions_needed == 1 and submitter == by.name:
        raise CofuseError("own_round", f"{row.name} was made by a round of {by.name}")
    with store.database.write() as db:
        key = PIVOTS.c.name == row.name
        kept = json.loads(db.scalar(select(PIVOTS.c.promotions_json).where(key)) or "{}")
        if by.name not in kept:
            kept[by.name] = raw
            db.execute(update(PIVOTS).where(key).values(promotions_json=json.dumps(kept)))
            data = {"content_sha256": promotion.sha256, "of": row.promotions_needed}
            record(db, Entry(actor=by.uri, act="pivot.promoted", obj=row.name, data=data))
    with store.changed:
        store.changed.notify_all()
    return store.pivot(row.name)


def require_promoted(row: PivotRow) -> None:
    """Raise CofuseError not_promoted while a pivot waits for operators."""
    if row.waits_for:
        said = f"; said so far by {', '.join(row.promoted_by)}" if row.promoted_by else ""
        more = f"{row.waits_for} more operator{'s' if row.waits_for > 1 else ''}"
        raise CofuseError("not_promoted", f"{row.name} waits for the yes of {more}{said}")


def require_released(database: Database, sha256: str) -> None:
    """Raise CofuseError not_promoted for a file that only waiting pivots have."""
    with database.read() as db:
        query = select(PIVOTS).where(PIVOTS.c.files_json.contains(sha256, autoescape=True))
        holders = [pivot_row(row) for row in db.execute(query).mappings()]
    if holders and all(row.waits_for for row in holders):
        require_promoted(holders[-1])
