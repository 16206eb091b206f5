"""Certificates that are wrong in one way each, for the tests of who gets in."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from protos.tls import TlsFiles
from trust.ca import create_authority, new_identity, sign_request
from trust.identity import Role


def issued(
    authority: Path, home: Path, role: Role, name: str, *, days: float = 1, ca: Path | None = None
) -> TlsFiles:
    """A new key at `home` and its certificate by an authority; the caller trusts `ca`."""
    request = new_identity(home, role, name)
    pem = sign_request(authority, request, role=role, name=name, days=days)
    (home / "certificate.pem").write_bytes(pem)
    return TlsFiles(
        ca=ca or authority / "ca.pem", certificate=home / "certificate.pem", key=home / "key.pem"
    )


def expired(authority: Path, home: Path, role: Role, name: str) -> TlsFiles:
    """One that ended two minutes ago; it began five minutes ago."""
    return issued(authority, home, role, name, days=-2 / 1440)


def foreign(authority: Path, home: Path, role: Role, name: str, *, other: str) -> TlsFiles:
    """The same identity by another authority, which is named `other`."""
    create_authority(home / "authority", other)
    return issued(home / "authority", home, role, name, ca=authority / "ca.pem")


def for_servers(authority: Path, home: Path, role: Role, name: str) -> TlsFiles:
    """By the right authority, but for the use of servers."""
    files = issued(authority, home, role, name)
    _reissue(authority, files, ExtendedKeyUsageOID.SERVER_AUTH)
    return files


def by_a_member(authority: Path, home: Path, role: Role, name: str) -> TlsFiles:
    """Signed with the key of a member, who is no authority; the member's own goes along."""
    member = issued(authority, home / "member", "participant", "mallory")
    files = issued(authority, home, role, name)
    chain = _signed_by(member, files)
    files.certificate.write_bytes(chain + member.certificate.read_bytes())
    return files


def _reissue(authority: Path, files: TlsFiles, usage: x509.ObjectIdentifier) -> None:
    signer = TlsFiles(ca=files.ca, certificate=authority / "ca.pem", key=authority / "ca.key")
    files.certificate.write_bytes(_signed_by(signer, files, usage))


def _signed_by(
    signer: TlsFiles, files: TlsFiles, usage: x509.ObjectIdentifier | None = None
) -> bytes:
    """A certificate as it is, signed by another key, and perhaps for another use."""
    found = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    issuer = x509.load_pem_x509_certificate(signer.certificate.read_bytes())
    key = serialization.load_pem_private_key(signer.key.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(found.subject)
        .issuer_name(issuer.subject)
        .public_key(found.public_key())
        .serial_number(found.serial_number)
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
    )
    for extension in found.extensions:
        value = extension.value
        if usage is not None and isinstance(value, x509.ExtendedKeyUsage):
            value = x509.ExtendedKeyUsage([usage])
        if isinstance(value, x509.AuthorityKeyIdentifier):
            public = key.public_key()
            value = x509.AuthorityKeyIdentifier.from_issuer_public_key(public)
        builder = builder.add_extension(value, critical=extension.critical)
    return builder.sign(key, hashes.SHA384()).public_bytes(serialization.Encoding.PEM)
