"""Why a handshake fails, as far as one's own files tell: a library's words name none of it."""

from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization


def fault_of(ca: Path, certificate: Path, key: Path, now: datetime | None = None) -> str:
    """What is wrong between one's three PEM files, with the cure; empty: nothing that they show.

    Args: now: UTC; default: the machine's clock.
    """
    now = now or datetime.now(UTC)
    try:
        authority = x509.load_pem_x509_certificate(ca.read_bytes())
        leaf = x509.load_pem_x509_certificate(certificate.read_bytes())
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        return f"{error.filename}: cannot be read ({error.strerror})"
    except (ValueError, TypeError):
        return f"one of {ca}, {certificate} and {key} is no PEM file of its kind: put it back"
    if leaf.public_key() != private.public_key():
        return f"{certificate} was not made for {key}: put the certificate of this key there"
    try:
        leaf.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return f"{certificate} was not signed by {ca}: get both from one operator"
    if now < leaf.not_valid_before_utc:
        return f"{certificate} begins {leaf.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: set the clock"
    if now > leaf.not_valid_after_utc:
        return (
            f"{certificate} ended {leaf.not_valid_after_utc:%Y-%m-%d %H:%M} UTC: check the clock, "
            "or move it away, and ask the operator for a new invitation (cofuse join)"
        )
    return ""
