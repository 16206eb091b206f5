"""Whether a submission comes with its submitter's signed order, a promotion with its operator's."""

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from coordinator.clock import now_unix_ms
from protos.errors import CofuseError
from trust.identity import Identity
from trust.orders import open_order, open_promotion
from trust.statements import Promotion, StatementError

_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def checked_request_id(text: str) -> str:
    """Return the id when it is one. Raises: CofuseError bad_request."""
    if not _REQUEST_ID.fullmatch(text):
        raise CofuseError("bad_request", "request_id: wanted 1..64 of A-Z a-z 0-9 _ -")
    return text


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
        try:
            order = open_order(raw, self._authority.read_bytes(), _now())
        except StatementError as error:
            raise CofuseError("bad_request", f"order_json: {error}") from error
        found = (order.submitted_by, order.spec, order.nonce, order.recurring)
        if found != (by.uri, spec_json, request_id, recurring):
            raise CofuseError("bad_request", "order_json: it orders something else than is asked")

    def promotion(self, raw: str, by: Identity, pivot: str) -> Promotion:
        """The caller's signed yes to a pivot. Raises: CofuseError bad_request."""
        if not raw:
            raise CofuseError("bad_request", "promotion_json: found none, wanted a signed one")
        try:
            promotion = open_promotion(raw, self._authority.read_bytes(), _now())
        except StatementError as error:
            raise CofuseError("bad_request", f"promotion_json: {error}") from error
        if (promotion.by, promotion.pivot) != (by.uri, pivot):
            raise CofuseError("bad_request", "promotion_json: of somebody else, or another pivot")
        return promotion


def _now() -> datetime:
    return datetime.fromtimestamp(now_unix_ms() / 1000, UTC)
