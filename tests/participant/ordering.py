"""Rounds as their submitter signed them: an authority, and a researcher whom it knows."""

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

from trust.ca import AUTHORITY_CERTIFICATE, create_authority, new_identity, sign_request
from trust.orders import sign_as
from trust.pivot_manifest import utc
from trust.statements import Order


def authority_at(home: Path, researcher: str = "ada") -> None:
    """Make home/ca.pem, and home/<researcher> with a key that it certifies."""
    create_authority(home / "authority", "test")
    folder = home / researcher
    pem = sign_request(
        home / "authority",
        new_identity(folder, "researcher", researcher),
        role="researcher",
        name=researcher,
    )
    (folder / "certificate.pem").write_bytes(pem)
    (home / "ca.pem").write_bytes((home / "authority" / AUTHORITY_CERTIFICATE).read_bytes())


def ordered(
    home: Path,
    spec_json: str,
    nonce: str,
    now_unix_ms: int,
    *,
    researcher: str = "ada",
    recurring: bool = False,
) -> str:
    """The researcher's order of a spec; it counts for 300 days."""
    now = datetime.fromtimestamp(now_unix_ms / 1000, UTC)
    order = Order(
        sha256=hashlib.sha256(spec_json.encode()).hexdigest(),
        spec=spec_json,
        recurring=recurring,
        submitted_by=f"cofuse://researcher/{researcher}",
        nonce=nonce,
        issued=utc(now),
        not_after=utc(now + timedelta(days=300)),
    )
    folder = home / researcher
    return sign_as(order, folder / "key.pem", folder / "certificate.pem")
