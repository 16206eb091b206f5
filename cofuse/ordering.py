"""The asking side of signed orders and promotions (trust/orders.py)."""

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from trust.identity import identity_of
from trust.orders import sign_as
from trust.pivot_manifest import utc
from trust.statements import Order, Promotion

LATE: Final = timedelta(days=7)
"""Beyond a round's deadline: it begins when an operator approves it."""
CALENDAR: Final = timedelta(days=365)
"""After this, rounds by the calendar are to be ordered again."""


@dataclass(frozen=True, slots=True)
class Orderer:
    """Signs with an identity's key; both files are read each time, as they may be renewed."""

    key: Path
    certificate: Path

    def order(self, spec_json: str, nonce: str, lasts: timedelta, *, recurring: bool) -> str:
        """Return the signed order of a spec. Raises: OSError."""
        now = datetime.now(UTC)
        order = Order(
            sha256=hashlib.sha256(spec_json.encode("utf-8")).hexdigest(),
            spec=spec_json,
            recurring=recurring,
            submitted_by=identity_of(self.certificate.read_bytes()).uri,
            nonce=nonce,
            issued=utc(now),
            not_after=utc(now + lasts),
        )
        return sign_as(order, self.key, self.certificate)

    def promotion(self, pivot: str, content_sha256: str) -> str:
        """Return an operator's signed yes to a pivot's content. Raises: OSError."""
        promotion = Promotion(
            sha256=content_sha256,
            pivot=pivot,
            by=identity_of(self.certificate.read_bytes()).uri,
            issued=utc(datetime.now(UTC)),
        )
        return sign_as(promotion, self.key, self.certificate)
