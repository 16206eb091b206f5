import stat
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError
from hypothesis import given
from hypothesis import strategies as st

from trust.ca import (
    Identity,
    IdentityError,
    create_authority,
    fingerprint,
    identity_of,
    new_identity,
    public_key_bytes,
    sign_request,
)

ROLES = ("participant", "researcher", "operator", "coordinator")


@pytest.fixture
def authority(tmp_path: Path) -> Path:
    create_authority(tmp_path / "ca", "consortium")
    return tmp_path / "ca"


def request_of(uri: str | None, curve: ec.EllipticCurve) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "x")])
    )
    if uri is not None:
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
        builder = builder.add_extension(names, critical=False)
    request = builder.sign(ec.generate_private_key(curve), hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM)


@pytest.mark.parametrize("role", ROLES)
def test_a_certificate_states_the_identity_it_was_issued_for(
    authority: Path, tmp_path: Path, role: str
) -> None:
    request = new_identity(tmp_path / "holder", role, "st-anna")
    pem = sign_request(authority, request, role=role, name="st-anna", days=7)
    assert identity_of(pem) == Identity(role, "st-anna")
    der = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    assert identity_of(der) == identity_of(pem)
    assert fingerprint(der) == fingerprint(pem)
    assert len(fingerprint(pem)) == 64


def test_only_a_coordinator_serves_and_only_the_others_are_clients(
    authority: Path, tmp_path: Path
) -> None:
    usages = {}
    for role in ROLES:
        request = new_identity(tmp_path / role, role, "x")
        certificate = x509.load_pem_x509_certificate(
            sign_request(authority, request, role=role, name="x")
        )
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        usages[role] = list(usage)
        assert bool(names.get_values_for_type(x509.DNSName)) == (role == "coordinator")
    assert usages.pop("coordinator") == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert set(map(tuple, usages.values())) == {(ExtendedKeyUsageOID.CLIENT_AUTH,)}


def test_the_chain_verifies_under_its_own_authority_and_no_other(
    authority: Path, tmp_path: Path
) -> None:
    create_authority(tmp_path / "other", "consortium")
    request = new_identity(tmp_path / "hub", "coordinator", "hub")
    leaf = x509.load_pem_x509_certificate(
        sign_request(authority, request, role="coordinator", name="hub", hosts=("127.0.0.1",))
    )

    def verify(directory: Path) -> None:
        root = x509.load_pem_x509_certificate((directory / "ca.pem").read_bytes())
        address = x509.IPAddress(ip_address("127.0.0.1"))
        PolicyBuilder().store(Store([root])).build_server_verifier(address).verify(leaf, [])

    verify(authority)
    with pytest.raises(VerificationError):
        verify(tmp_path / "other")


def test_the_request_carries_no_private_key_and_the_key_is_for_its_owner_only(
    authority: Path, tmp_path: Path
) -> None:
    request = new_identity(tmp_path / "holder", "participant", "a")
    assert b"PRIVATE" not in request
    assert request == (tmp_path / "holder" / "request.csr").read_bytes()
    for key in (tmp_path / "holder" / "key.pem", authority / "ca.key"):
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert sorted(path.name for path in (tmp_path / "holder").iterdir()) == [
        "key.pem",
        "request.csr",
    ]


@pytest.mark.parametrize(
    "make",
    [
        lambda directory: create_authority(directory, "again"),
        lambda directory: new_identity(directory, "participant", "again"),
    ],
    ids=["authority", "identity"],
)
def test_a_key_is_never_overwritten(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FileExistsError, match="wanted none"):
        make(tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_request_for_somebody_else_is_refused(authority: Path, tmp_path: Path) -> None:
    request = new_identity(tmp_path / "holder", "participant", "mallory")
    with pytest.raises(IdentityError, match="mallory"):
        sign_request(authority, request, role="participant", name="alice")
    with pytest.raises(IdentityError, match="operator"):
        sign_request(authority, request, role="operator", name="mallory")


def test_a_request_changed_on_the_way_is_refused(authority: Path, tmp_path: Path) -> None:
    csr = x509.load_pem_x509_csr(new_identity(tmp_path / "holder", "participant", "aaaa"))
    der = csr.public_bytes(serialization.Encoding.DER).replace(b"aaaa", b"bbbb")
    forged = x509.load_der_x509_csr(der).public_bytes(serialization.Encoding.PEM)
    with pytest.raises(IdentityError, match="not signed"):
        sign_request(authority, forged, role="participant", name="bbbb")


@pytest.mark.parametrize(
    "request_pem",
    [
        b"not a request",
        request_of(None, ec.SECP384R1()),
        request_of("https://example.org", ec.SECP384R1()),
        request_of("cofuse://participant/a", ec.SECP256R1()),
    ],
    ids=["garbage", "nobody", "no identity", "other curve"],
)
def test_a_request_that_binds_no_usable_key_is_refused(authority: Path, request_pem: bytes) -> None:
    with pytest.raises(IdentityError, match="found"):
        sign_request(authority, request_pem, role="participant", name="a")


@given(st.text(max_size=60) | st.from_regex(r"[a-z0-9-]{41,60}"))
def test_a_name_is_plain_or_refused(name: str) -> None:
    plain = 1 <= len(name) <= 40 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    if not plain:
        with pytest.raises(IdentityError):
            new_identity(Path("/nonexistent"), "participant", name)


def test_a_role_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="wanted one of participant"):
        new_identity(tmp_path, "root", "a")
    assert list(tmp_path.iterdir()) == []


def test_the_authority_itself_has_no_identity(authority: Path) -> None:
    with pytest.raises(IdentityError, match="exactly one"):
        identity_of((authority / "ca.pem").read_bytes())
    with pytest.raises(IdentityError, match="wanted PEM or DER"):
        identity_of(b"\x00")


def test_the_public_key_is_the_one_of_the_request(authority: Path, tmp_path: Path) -> None:
    request = new_identity(tmp_path / "holder", "participant", "a")
    pem = sign_request(authority, request, role="participant", name="a")
    key = x509.load_pem_x509_csr(request).public_key()
    expected = key.public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    assert public_key_bytes(pem) == expected


def test_a_certificate_never_outlives_its_authority(authority: Path, tmp_path: Path) -> None:
    request = new_identity(tmp_path / "holder", "participant", "a")
    pem = sign_request(authority, request, role="participant", name="a", days=36500)
    root = x509.load_pem_x509_certificate((authority / "ca.pem").read_bytes())
    leaf = x509.load_pem_x509_certificate(pem)
    assert leaf.not_valid_after_utc == root.not_valid_after_utc
