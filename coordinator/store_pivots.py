"""The coordinator's memory of pivots, and of who put which file."""

from collections.abc import Sequence

from sqlalchemy import delete, func, insert, select

from coordinator.audit import COORDINATOR
from coordinator.happenings import Evaluated
from coordinator.queries import find_round, next_pivot_name, pivot_row, put_manifest, put_pivot
from coordinator.round_rows import take_step
from coordinator.round_state import Round
from coordinator.tables import ARTIFACTS, PIVOTS, PivotRow
from coordinator.transactions import Transactions
from protos.errors import CofuseError
from protos.messages import FileRef


class PivotTables(Transactions):
    """Pivots and artifacts."""

    promotions_needed: int = 0
    """Operators who must say yes to a pivot from now on (coordinator/promotion.py)."""

    def add_artifact(self, sha256: str, owner: str, kind: str, size_bytes: int) -> None:
        """Remember who put a complete file, and as what. Repeating changes nothing."""
        with self._write() as db:
            key = (ARTIFACTS.c.sha256 == sha256) & (ARTIFACTS.c.owner == owner)
            if db.execute(select(ARTIFACTS).where(key)).first() is None:
                row = {"sha256": sha256, "owner": owner, "kind": kind, "size_bytes": size_bytes}
                db.execute(insert(ARTIFACTS).values(row))

    def artifact_kinds(self, sha256: str) -> dict[str, tuple[str, int]]:
        """Owner -> (kind, size) of one file."""
        query = select(ARTIFACTS).where(ARTIFACTS.c.sha256 == sha256)
        with self.database.read() as db:
            return {r["owner"]: (r["kind"], r["size_bytes"]) for r in db.execute(query).mappings()}

    def forget_artifact(self, sha256: str) -> None:
        """Forget who put a file that is gone."""
        with self._write() as db:
            db.execute(delete(ARTIFACTS).where(ARTIFACTS.c.sha256 == sha256))

    def add_pivot(
        self,
        *,
        name: str,
        parent: str,
        round_id: str,
        files: Sequence[FileRef],
        evals_json: str,
        by: str = COORDINATOR,
    ) -> PivotRow:
        """Publish a pivot. Repeating changes nothing; another content under the name is refused."""
        with self._write() as db:
            put_pivot(
                db, name, parent, round_id, files, evals_json, by, needed=self.promotions_needed
            )
        return self.pivot(name)

    def publish(
        self, round_id: str, attempt: int, *, parent: str, files: Sequence[FileRef], evals_json: str
    ) -> Round:
        """End a round with its pivot, both in one transaction: no half of it is ever visible.

        Raises: IllegalTransitionError when the round has ended, or another worker has it.
        """
        with self._write() as db:
            after = take_step(db, round_id, Evaluated(attempt))
            name = find_round(db, round_id).pivot_name
            put_pivot(db, name, parent, round_id, files, evals_json, needed=self.promotions_needed)
            return after

    def replace_manifest(self, name: str, manifest: FileRef) -> None:
        """Let a pivot have a manifest that was issued again."""
        with self._write() as db:
            put_manifest(db, name, manifest)

    def free_pivot_name(self) -> str:
        """A name that no pivot and no round has taken yet."""
        with self.database.read() as db:
            return next_pivot_name(db)

    def pivot(self, name: str) -> PivotRow:
        """One pivot.

        Raises: CofuseError unknown_pivot, naming those there are.
        """
        found = {row.name: row for row in self.pivots()}
        if name not in found:
            raise CofuseError(
                "unknown_pivot", f"no pivot {name!r}; there are: {', '.join(found) or 'none yet'}"
            )
        return found[name]

    def pivots(self) -> list[PivotRow]:
        """All pivots, oldest first."""
        order = (PIVOTS.c.created_unix_ms, func.length(PIVOTS.c.name), PIVOTS.c.name)
        with self.database.read() as db:
            return [
                pivot_row(row) for row in db.execute(select(PIVOTS).order_by(*order)).mappings()
            ]
