"""Who somebody is: the one thing that a certificate of the authority states, and how it is read.

An identity is a role and a name, and stands in the certificate as the URI cofuse://<role>/<name>.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import Final, Literal, TypeGuard, get_args

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID

Role = Literal["participant", "researcher", "operator", "coordinator"]

# Clocks of two institutions differ; a certificate is valid a little before it was made.
CLOCK_SKEW: Final = timedelta(minutes=5)
_KEPT: Final = 4096
"""Certificates remembered, some 2 kB each: calls come by the thousand under one."""
_NAME: Final = re.compile(r"[a-z0-9-]{1,40}")
_IDENTITY: Final = re.compile(r"cofuse://([a-z]+)/([a-z0-9-]{1,40})")

UNREADABLE: Final = (
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.ExtensionNotFound,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
"""What the library raises for certificates and requests that are none, or not of our kind."""


class IdentityError(ValueError):
    """A name, request or certificate does not state a usable identity."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a certificate of the authority says about the holder of its key."""

    role: Role
    name: str

    @property
    def uri(self) -> str:
        """The identity as it stands in the certificate's subject alternative names."""
        return f"cofuse://{self.role}/{self.name}"


@dataclass(frozen=True, slots=True)
class Leaf:
    """A holder's certificate, as far as anybody asks."""

    identity: Identity
    serial: int
    issued_unix_s: float
    """When the authority made it, by the authority's clock, in whole seconds."""
    ends_unix_s: float
    calls: bool
    """Whether it is a caller's; a server's own gives no right to call."""


@lru_cache(_KEPT)
def leaf_of(certificate: bytes) -> Leaf:
    """Read a certificate, in PEM or DER. Its chain is not checked here either.

    Raises: IdentityError when it does not state exactly one identity, or not what it is for.
    """
    found = load_certificate(certificate)
    try:
        usage = list(found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    except UNREADABLE:
        raise IdentityError(
            "found a certificate that does not say what it is for, wanted one for callers: "
            "ask the operator of the coordinator to issue it again"
        ) from None
    return Leaf(
        identity=identity_of(certificate),
        serial=found.serial_number,
        issued_unix_s=(found.not_valid_before_utc + CLOCK_SKEW).timestamp(),
        ends_unix_s=found.not_valid_after_utc.timestamp(),
        calls=usage == [ExtendedKeyUsageOID.CLIENT_AUTH],
    )


def identity_of(certificate: bytes) -> Identity:
    """Read the identity out of a certificate, in PEM or DER.

    The chain is not checked here: TLS has done that before a certificate gets this far.
    Raises: IdentityError when it does not state exactly one identity.
    """
    leaf = load_certificate(certificate)
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except UNREADABLE:
        raise IdentityError(_no_identity([])) from None
    return parse_identity(names.get_values_for_type(x509.UniformResourceIdentifier))


def hosts_of(certificate: bytes) -> tuple[str, ...]:
    """Names and addresses that a server's certificate stands for, as they were given; () for none.

    Args: certificate: PEM or DER. Raises: IdentityError when it is no certificate.
    """
    leaf = load_certificate(certificate)
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except UNREADABLE:
        return ()
    return tuple(str(one.value) for one in names if isinstance(one, (x509.DNSName, x509.IPAddress)))


def public_key_bytes(certificate: bytes) -> bytes:
    """The certificate's public key in PEM, as the engine wants it to register a node."""
    key = load_certificate(certificate).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return key.public_bytes(serialization.Encoding.PEM, form)


def fingerprint(certificate: bytes) -> str:
    """Lower-case hex of the SHA-256 of the certificate's DER: what two people read out aloud."""
    return load_certificate(certificate).fingerprint(hashes.SHA256()).hex()


def checked_name(name: str) -> str:
    """Return the name when it is one. Raises: IdentityError."""
    if not _NAME.fullmatch(name):
        raise IdentityError(
            f"found the name {name!r}, wanted 1 to 40 of the characters a-z, 0-9 and '-': "
            "choose another name"
        )
    return name


def _is_role(role: str) -> TypeGuard[Role]:
    return role in get_args(Role)


def checked_identity(role: str, name: str) -> Identity:
    """The identity of a role and a name that may be. Raises: IdentityError."""
    if not _is_role(role):
        raise IdentityError(f"found the role {role!r}, wanted one of {', '.join(get_args(Role))}")
    return Identity(role, checked_name(name))


def parse_identity(uris: Sequence[str]) -> Identity:
    """The one identity among a certificate's URIs. Raises: IdentityError when it is not one."""
    match = _IDENTITY.fullmatch(uris[0]) if len(uris) == 1 else None
    if match is None or not _is_role(match[1]):
        raise IdentityError(_no_identity(uris))
    return Identity(match[1], match[2])


def _no_identity(uris: Sequence[str]) -> str:
    return (
        f"found the URIs {list(uris)}, wanted exactly one of the form cofuse://<role>/<name>: "
        "ask the operator of the coordinator to issue the certificate again"
    )


def load_certificate(certificate: bytes) -> x509.Certificate:
    """Parse PEM or DER. Raises: IdentityError."""
    is_pem = certificate.lstrip().startswith(b"-----BEGIN")
    load = x509.load_pem_x509_certificate if is_pem else x509.load_der_x509_certificate
    try:
        return load(certificate)
    except UNREADABLE as error:
        raise IdentityError(
            f"found {len(certificate)} bytes that are no X.509 certificate, wanted PEM or DER"
        ) from error
