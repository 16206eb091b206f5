"""Whether a submission comes with its submitter's signed order: participants ask for it later."""

from datetime import UTC, datetime
from pathlib import Path

from coordinator.clock import now_unix_ms
from protos.errors import CofuseError
from trust.identity import Identity
from trust.orders import open_order
from trust.statements import StatementError


class Orders:
    """Checks orders against the authority's certificate."""

    def __init__(self, authority: Path) -> None:
        """Args: authority: ca.pem."""
        self._authority = authority

    def check(
        self, raw: str, by: Identity, *, spec_json: str, request_id: str, recurring: bool = False
    ) -> None:
        """Return when the caller has signed exactly this submission. Raises: CofuseError."""
        if not raw:
            raise CofuseError("bad_request", "order_json: found none, wanted a signed order")
        now = datetime.fromtimestamp(now_unix_ms() / 1000, UTC)
        try:
            order = open_order(raw, self._authority.read_bytes(), now)
        except StatementError as error:
            raise CofuseError("bad_request", f"order_json: {error}") from error
        found = (order.submitted_by, order.spec, order.nonce, order.recurring)
        if found != (by.uri, spec_json, request_id, recurring):
            raise CofuseError("bad_request", "order_json: it orders something else than is asked")
