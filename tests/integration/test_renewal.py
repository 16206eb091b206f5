"""A certificate is replaced at half of its life, and by nothing but its own successor."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.config import CoordinatorConfig
from coordinator.revocations import Revocations
from coordinator.wiring import Running, serving
from participant.client import Client
from participant.renewal import Renewal, renew
from protos.config import TlsConfig
from protos.errors import RemoteError
from protos.tls import TlsFiles
from tests.integration import certificates
from tests.integration.test_joining import DAYS, config_at
from trust.identity import IdentityError, leaf_of, public_key_bytes

LIFE_S = 86_400.0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("renewal")


@pytest.fixture(scope="module")
def hub(root: Path) -> Iterator[Running]:
    with serving(config_at(root)) as running:
        yield running


@pytest.fixture
def member(hub: Running, root: Path, tmp_path: Path, request: Any) -> TlsFiles:
    """A participant whose certificate lives a day."""
    name = f"p{abs(hash(request.node.name))}"
    return certificates.issued(root / "ca", tmp_path / name, "participant", name, days=1)


def test_nothing_happens_before_half_of_its_life_and_a_successor_comes_after(
    hub: Running, member: TlsFiles
) -> None:
    old = member.certificate.read_bytes()
    issued = leaf_of(old).issued_unix_s
    now = [issued + 0.49 * LIFE_S]
    renewal = Renewal(hub.address, member, clock=lambda: now[0])
    assert not renewal.renew_if_due()
    assert member.certificate.read_bytes() == old
    now[0] = issued + 0.56 * LIFE_S
    assert renewal.renew_if_due()
    new = member.certificate.read_bytes()
    before, after = leaf_of(old), leaf_of(new)
    assert after.identity == before.identity
    assert after.serial != before.serial
    assert public_key_bytes(new) == public_key_bytes(old)
    assert after.ends_unix_s - after.issued_unix_s == DAYS * LIFE_S
    assert not renewal.renew_if_due(), "it is young again"


def test_the_successor_works_at_once_and_the_old_one_still_does(
    hub: Running, member: TlsFiles, tmp_path: Path
) -> None:
    opened = Client(hub.address, member)
    opened.join("test")
    renew(hub.address, member)
    opened.join("test")
    opened.close()
    fresh = Client(hub.address, member)
    fresh.join("test")
    fresh.close()


def test_a_revoked_certificate_is_not_renewed(hub: Running, member: TlsFiles) -> None:
    old = member.certificate.read_bytes()
    Revocations(hub.store.database).revoke_one(leaf_of(old).serial, "test")
    deadline, refusal = time.monotonic() + 10.0, ""
    while not refusal and time.monotonic() < deadline:
        try:
            renew(hub.address, member)
        except RemoteError as error:
            refusal = error.error_id
        else:  # it was not heard of yet
            member.certificate.write_bytes(old)
    assert refusal == "revoked"


@pytest.mark.parametrize("what", ["another name", "another key", "no later end"])
def test_an_answer_that_is_not_our_successor_is_refused_and_the_old_one_stays(
    hub: Running,
    member: TlsFiles,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    old = member.certificate.read_bytes()
    name = "somebody" if what == "another name" else leaf_of(old).identity.name
    other = certificates.issued(root / "ca", tmp_path / "other", "participant", name, days=9)
    answer = old if what == "no later end" else other.certificate.read_bytes()
    monkeypatch.setattr("coordinator.enroll_service.renew", lambda *_: answer)
    with pytest.raises(IdentityError, match="found"):
        renew(hub.address, member)
    assert member.certificate.read_bytes() == old


def test_a_coordinator_that_is_away_is_asked_again_in_the_background(
    hub: Running, member: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("participant.renewal.SHORTEST_PAUSE_S", 0.05)
    monkeypatch.setattr("participant.renewal.TRIES", 1e9)
    monkeypatch.setattr("participant.renewal.CALL_S", 0.5)
    addresses = iter(["127.0.0.1:1", "127.0.0.1:1"])
    real, asked = renew, list[str]()

    def flaky(address: str, tls: TlsFiles) -> Any:
        asked.append(next(addresses, address))
        return real(asked[-1], tls)

    monkeypatch.setattr("participant.renewal.renew", flaky)
    old = leaf_of(member.certificate.read_bytes())
    half = old.issued_unix_s + 0.6 * LIFE_S
    renewal = Renewal(hub.address, member, clock=lambda: half)
    renewal.start()
    deadline = time.monotonic() + 30.0
    while leaf_of(member.certificate.read_bytes()) == old:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    renewal.stop()
    assert asked == ["127.0.0.1:1", "127.0.0.1:1", hub.address]


@pytest.mark.slow
def test_a_coordinator_without_the_authoritys_key_says_so(
    root: Path, member: TlsFiles, tmp_path: Path
) -> None:
    config = CoordinatorConfig(
        listen="127.0.0.1:0",
        engine_listen="127.0.0.1:0",
        data_dir=tmp_path / "data",
        tls=TlsConfig(
            ca=root / "ca" / "ca.pem",
            certificate=root / "tls" / "certificate.pem",
            key=root / "tls" / "key.pem",
        ),
    )
    with serving(config) as running, pytest.raises(RemoteError, match="coordinator sign") as caught:
        renew(running.address, member)
    assert caught.value.error_id == "no_authority"
