"""Who is who: a small certificate authority, and the identity that a certificate states.

Every private key is made in the folder where it stays; only a signing request leaves it. The keys
are P-384, because the engine signs its calls with the same key that the TLS certificate binds.
The authority states one thing about a key: the URI cofuse://<role>/<name>.
"""

import os
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from trust.identity import (
    CLOCK_SKEW,
    UNREADABLE,
    Identity,
    IdentityError,
    Role,
    checked_identity,
    checked_name,
    fingerprint,
    hosts_of,
    identity_of,
    load_certificate,
    parse_identity,
    public_key_bytes,
)

__all__ = [
    "CLOCK_SKEW",
    "Identity",
    "IdentityError",
    "Role",
    "checked_hosts",
    "create_authority",
    "fingerprint",
    "hosts_of",
    "identity_of",
    "new_identity",
    "public_key_bytes",
    "renew",
    "sign_request",
]

AUTHORITY_KEY: Final = "ca.key"
AUTHORITY_CERTIFICATE: Final = "ca.pem"
KEY: Final = "key.pem"
CERTIFICATE: Final = "certificate.pem"
REQUEST: Final = "request.csr"
AUTHORITY_DAYS: Final = 3650
_HOST: Final = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]|\.(?=[A-Za-z0-9_]))*")


def create_authority(directory: Path, name: str) -> None:
    """Make the authority's key (mode 0600) and its own certificate in directory.

    Raises: FileExistsError when a key is there already; it is never overwritten.
    """
    key = _new_key(directory / AUTHORITY_KEY, checked_name(name))
    subject = _subject(name)
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    (directory / AUTHORITY_CERTIFICATE).write_bytes(pem)


def new_identity(directory: Path, role: Role, name: str) -> bytes:
    """Make key.pem (mode 0600) and request.csr in directory; return the request, in PEM.

    Raises: FileExistsError when a key is there already; it is never overwritten.
        IdentityError when the role or the name is not allowed.
    """
    identity = checked_identity(role, name)
    key = _new_key(directory / KEY, name)
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_subject(name))
        .add_extension(_alternative_names(identity, ()), critical=False)
        .sign(key, hashes.SHA384())
        .public_bytes(serialization.Encoding.PEM)
    )
    (directory / REQUEST).write_bytes(request)
    return request


def sign_request(
    authority: Path,
    request: bytes,
    *,
    role: Role,
    name: str,
    days: float = 365,
    hosts: Sequence[str] = ("localhost", "127.0.0.1"),
) -> bytes:
    """Issue the certificate that the authority's operator means to give: to role and name.

    Args: authority: the folder of create_authority. request: a CSR in PEM. hosts: DNS names and
        addresses of a server; only a coordinator is one, every other role is a client.
    Returns: the certificate, in PEM; it ends before the authority's own does.
    Raises: IdentityError when the request is not readable, is not signed by its own key, has a
        key that is not P-384, or asks for another identity than the one named here.
    """
    identity = checked_identity(role, name)
    return _issue(authority, identity, _key_of_request(request, identity), days, hosts)


def renew(
    authority: Path, certificate: bytes, days: float, hosts: Sequence[str] | None = None
) -> bytes:
    """Issue a certificate again: the same identity and key, from now on.

    Whether it may be renewed is the caller's of this function to know.
    Args: hosts: a server's; None: those that it has.
    Raises: IdentityError when it states no identity, or has another key than P-384.
    """
    key = _checked_key(load_certificate(certificate).public_key())
    names = hosts_of(certificate) if hosts is None else hosts
    return _issue(authority, identity_of(certificate), key, days, names)


def _issue(
    authority: Path,
    identity: Identity,
    public_key: ec.EllipticCurvePublicKey,
    days: float,
    hosts: Sequence[str],
) -> bytes:
    authority_key, authority_certificate = _load_authority(authority)
    serves = identity.role == "coordinator"
    usage = ExtendedKeyUsageOID.SERVER_AUTH if serves else ExtendedKeyUsageOID.CLIENT_AUTH
    now = datetime.now(UTC)
    ends = min(now + timedelta(days=days), authority_certificate.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_subject(identity.name))
        .issuer_name(authority_certificate.subject)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(ends)
    )
    names = _alternative_names(identity, hosts if serves else ())
    for extension, critical in _leaf_extensions(public_key, authority_key, usage):
        builder = builder.add_extension(extension, critical=critical)
    certificate = builder.add_extension(names, critical=False).sign(authority_key, hashes.SHA384())
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_of_request(request: bytes, identity: Identity) -> ec.EllipticCurvePublicKey:
    try:
        csr = x509.load_pem_x509_csr(request)
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        public_key, is_signed = csr.public_key(), csr.is_signature_valid
    except UNREADABLE as error:
        raise IdentityError(
            "found a signing request that cannot be read, or that names nobody; wanted the "
            f"{REQUEST} that enrolment wrote: send that file again"
        ) from error
    asked = parse_identity(names.get_values_for_type(x509.UniformResourceIdentifier))
    if asked != identity:
        raise IdentityError(
            f"found a request for {asked.uri}, wanted {identity.uri}: check with the applicant"
        )
    key = _checked_key(public_key)
    if not is_signed:
        raise IdentityError("found a request that its own key has not signed: ask for a new one")
    return key


def _checked_key(key: object) -> ec.EllipticCurvePublicKey:
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise IdentityError("found another key than P-384, which the engine needs: make a new one")
    return key


def _load_authority(directory: Path) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
    key = serialization.load_pem_private_key((directory / AUTHORITY_KEY).read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key, load_certificate((directory / AUTHORITY_CERTIFICATE).read_bytes())


def _new_key(path: Path, name: str) -> ec.EllipticCurvePrivateKey:
    """Make a key and write it, whole or not at all, and only where no key is yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)  # unlike a rename, a link refuses to replace what is there
    except FileExistsError:
        raise FileExistsError(
            f"found a key for {name} at {path}, wanted none: keep it, or move it away to start anew"
        ) from None
    finally:
        draft.unlink()
    return key


def _subject(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _alternative_names(identity: Identity, hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    return x509.SubjectAlternativeName(names + [_host_name(host) for host in hosts])


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def checked_hosts(hosts: Sequence[str]) -> list[str]:
    """Names and addresses as a certificate holds them: münchen.example as xn--mnchen-3ya.example.

    Raises: IdentityError naming one that is neither.
    """
    found = []
    for host in hosts:
        try:
            plain = str(ip_address(host)) if ":" in host else host.encode("idna").decode("ascii")
        except ValueError:
            plain = ""
        if not (":" in plain or _HOST.fullmatch(plain)):
            raise IdentityError(
                f"found the host {host!r}, wanted a name such as fuse.example.org, or an address"
            )
        found.append(plain)
    return found


def _leaf_extensions(
    public_key: ec.EllipticCurvePublicKey,
    authority_key: ec.EllipticCurvePrivateKey,
    usage: ObjectIdentifier,
) -> list[tuple[x509.ExtensionType, bool]]:
    """Each extension of a holder's certificate, and whether it is critical."""
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return [
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_key_usage(signs_certificates=False), True),
        (x509.ExtendedKeyUsage([usage]), False),
        (x509.SubjectKeyIdentifier.from_public_key(public_key), False),
        (issuer, False),
    ]


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
