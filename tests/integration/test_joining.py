"""From an invitation to a working identity, over the wire and nothing but the token trusted."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

from cofuse.joining import fetch_authority, join
from coordinator.config import CoordinatorConfig
from coordinator.enroll_service import EnrollService
from coordinator.invitations import Invitations
from coordinator.wiring import Running, serving
from participant.client import Client
from protos.config import TlsConfig
from protos.errors import CofuseError, RemoteError
from protos.tls import TlsFiles
from protos.v1 import enroll_pb2
from tests.integration import certificates
from tests.integration.test_proxies import ConnectProxy, make_proxy, through
from trust.ca import create_authority, new_identity
from trust.identity import Identity, IdentityError, fingerprint, leaf_of
from trust.pivot_manifest import SIGNER_FILE
from trust.seal_keys import RECIPIENT_FILE
from trust.tokens import Token

__all__ = ["make_proxy"]
DAYS = 3.0


class Hub:
    """A coordinator that enrols."""

    def __init__(self, root: Path, running: Running) -> None:
        self.root, self.running = root, running
        self.address = running.enroll_address
        self.authority = fingerprint((root / "ca" / "ca.pem").read_bytes())

    def invite(self, name: str, role: str = "participant") -> Token:
        identity = Identity(role, name)  # type: ignore[arg-type]
        return Invitations(self.running.store.database).invite(identity, self.authority, 600.0)


def config_at(root: Path) -> CoordinatorConfig:
    create_authority(root / "ca", "cofuse")
    own = certificates.issued(root / "ca", root / "tls", "coordinator", "coordinator")
    return CoordinatorConfig(
        listen="127.0.0.1:0",
        engine_listen="127.0.0.1:0",
        enroll_listen="127.0.0.1:0",
        authority=root / "ca",
        certificate_days=DAYS,
        data_dir=root / "data",
        tls=TlsConfig(ca=own.ca, certificate=own.certificate, key=own.key),
    )


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("joining")
    with serving(config_at(root)) as running:
        yield Hub(root, running)


def files_of(folder: Path) -> TlsFiles:
    return TlsFiles(
        ca=folder / "ca.pem", certificate=folder / "certificate.pem", key=folder / "key.pem"
    )


def test_who_joins_can_call_and_the_key_never_left(hub: Hub, tmp_path: Path) -> None:
    join(hub.address, hub.invite("st-anna"), tmp_path)
    client = Client(hub.running.address, files_of(tmp_path))
    client.join("test")
    client.close()
    leaf = leaf_of((tmp_path / "certificate.pem").read_bytes())
    assert leaf.identity == Identity("participant", "st-anna")
    assert leaf.ends_unix_s - leaf.issued_unix_s == DAYS * 86_400
    assert (tmp_path / "key.pem").stat().st_mode & 0o077 == 0
    for public in (SIGNER_FILE, RECIPIENT_FILE):
        assert (tmp_path / public).read_bytes() == (hub.root / "ca" / public).read_bytes()


def test_who_sits_behind_a_proxy_joins_through_it(
    hub: Hub,
    make_proxy: Callable[..., ConnectProxy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    proxy = make_proxy("secret")
    through(monkeypatch, f"http://user:secret@127.0.0.1:{proxy.port}")
    join(hub.address, hub.invite("st-clare"), tmp_path)
    assert proxy.asked == [hub.address] * 3


def test_a_key_that_is_there_already_is_the_one_certified(hub: Hub, tmp_path: Path) -> None:
    """What `cofuse participant init` left."""
    request = new_identity(tmp_path, "participant", "st-mary")
    join(hub.address, hub.invite("st-mary"), tmp_path)
    certificate = x509.load_pem_x509_certificate((tmp_path / "certificate.pem").read_bytes())
    assert certificate.public_key() == x509.load_pem_x509_csr(request).public_key()


def test_a_lost_answer_costs_nothing(hub: Hub, tmp_path: Path) -> None:
    token = hub.invite("st-lucia")
    join(hub.address, token, tmp_path)
    first = (tmp_path / "certificate.pem").read_bytes()
    (tmp_path / "certificate.pem").unlink()
    join(hub.address, token, tmp_path)
    assert (tmp_path / "certificate.pem").read_bytes() == first


def test_a_token_works_once(hub: Hub, tmp_path: Path) -> None:
    token = hub.invite("st-paul")
    join(hub.address, token, tmp_path / "first")
    with pytest.raises(RemoteError, match="has been used") as caught:
        join(hub.address, token, tmp_path / "second")
    assert caught.value.error_id == "bad_invitation"
    assert not (tmp_path / "second" / "certificate.pem").exists()


def test_a_folder_of_somebody_else_is_refused_and_the_token_stays_good(
    hub: Hub, tmp_path: Path
) -> None:
    new_identity(tmp_path / "other", "participant", "mallory")
    token = hub.invite("st-john")
    with pytest.raises(RemoteError, match="mallory") as caught:
        join(hub.address, token, tmp_path / "other")
    assert caught.value.error_id == "bad_request"
    join(hub.address, token, tmp_path / "own")


def test_a_certificate_that_is_there_is_not_replaced(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "certificate.pem").write_text("mine")
    with pytest.raises(IdentityError, match="wanted no certificate"):
        join(hub.address, hub.invite("st-luke"), tmp_path)
    assert (tmp_path / "certificate.pem").read_text() == "mine"


def test_a_coordinator_of_another_authority_never_hears_the_secret(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody between the two shows a certificate of their own."""
    token = replace(hub.invite("st-mark"), authority="0" * 64)
    heard: list[object] = []
    monkeypatch.setattr(Invitations, "redeem", lambda *words: heard.append(words))
    with pytest.raises(CofuseError, match="fingerprint") as caught:
        join(hub.address, token, tmp_path)
    assert caught.value.error_id == "wrong_authority"
    assert heard == []
    assert not (tmp_path / "ca.pem").exists()


@pytest.mark.slow
def test_who_has_copied_the_authoritys_certificate_cannot_speak_for_it(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It passes the fingerprint; the second connection then asks for the key behind it."""
    right = fetch_authority(hub.address, hub.authority)
    copied = config_at(tmp_path / "copy")
    reply = enroll_pb2.AuthorityReply(certificate_pem=right)
    monkeypatch.setattr(EnrollService, "Authority", lambda *_: reply)
    heard: list[object] = []
    monkeypatch.setattr(Invitations, "redeem", lambda *words: heard.append(words))
    with serving(copied) as impostor, pytest.raises(RemoteError) as caught:
        join(impostor.enroll_address, hub.invite("st-jude"), tmp_path / "victim")
    assert caught.value.error_id == "wrong_authority"
    assert heard == []


def test_an_address_where_nobody_enrols_is_told(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(CofuseError, match="not reached") as caught:
        join("127.0.0.1:1", hub.invite("st-james"), tmp_path)
    assert caught.value.error_id == "unreachable"
