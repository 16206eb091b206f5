"""Every call x every role x every state of a certificate, against a coordinator that serves.

A call that gets past the door meets the parser, which has no use for the bytes sent here: that is
how "granted" shows without doing anything.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Final

import grpc
import pytest

from coordinator.access import ANYBODY, ROLES
from coordinator.audit import lines
from coordinator.config import CoordinatorConfig
from coordinator.limits import Rates
from coordinator.refusals import REFUSED
from coordinator.revocations import Revocations
from coordinator.wiring import Running, serving
from protos.config import TlsConfig
from protos.errors import ERROR_KEY
from protos.tls import TlsFiles, dial
from tests.integration import certificates
from trust.ca import create_authority
from trust.chain import read_record
from trust.identity import Role, leaf_of

MEMBERS: Final[tuple[Role, ...]] = ("participant", "researcher", "operator")
NO_MESSAGE: Final = b"\xff\xff"
NO_CONNECTION: Final = "no connection"
STAT: Final = "/cofuse.v1.Transfer/Stat"
GRANTED: Final = "granted"
_PAST_THE_DOOR: Final = frozenset({"bad_request", "not_joined"})
"""What the parser says of NO_MESSAGE, and Attend before it reads."""


class Hub:
    """A coordinator, its authority, and one identity of each role in each state."""

    def __init__(self, root: Path, running: Running) -> None:
        self.root = root
        self.authority = root / "ca"
        self.running = running

    def files(self, state: str, role: Role) -> TlsFiles:
        """The certificate of `role` in `state`."""
        make = MAKE[state]
        return make(self.authority, self.root / state / role, role, f"{role}-{state}")

    def asks(self, files: TlsFiles) -> dict[str, str]:
        """How each call of the table ends under a certificate."""
        with closing(dial(self.running.address, files)) as channel:
            return {method: ends(channel, method) for method in ROLES}


def ends(channel: grpc.Channel, method: str) -> str:
    """How a call without a message ends: past the door, refused, or without a connection."""
    try:
        channel.unary_unary(method)(NO_MESSAGE, timeout=10)
    except grpc.RpcError as error:
        keys = dict(error.trailing_metadata() or ())
        if ERROR_KEY in keys:
            return GRANTED if keys[ERROR_KEY] in _PAST_THE_DOOR else str(keys[ERROR_KEY])
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return NO_CONNECTION
        return error.code().name
    return "answered"


def revoked(authority: Path, home: Path, role: Role, name: str) -> TlsFiles:
    """Valid until the test revokes it."""
    return certificates.issued(authority, home, role, name)


MAKE: Final[dict[str, Callable[[Path, Path, Role, str], TlsFiles]]] = {
    "valid": certificates.issued,
    "refused": certificates.issued,
    "revoked": revoked,
    "expired": certificates.expired,
    "wrong-use": certificates.for_servers,
    "by-a-member": certificates.by_a_member,
    "foreign-authority": lambda *who: certificates.foreign(*who, other="elsewhere"),
    # Of a consortium like ours: even the authority has the same name; only the key is another.
    "other-federation": lambda *who: certificates.foreign(*who, other="cofuse"),
}


Hold = Callable[[dict[str, str], dict[str, str]], None]


@pytest.fixture
def hold(record_property: Callable[[str, object], None]) -> Hold:
    """Hold what was found to what was wanted, case by case; the report says how many there were."""

    def held(found: dict[str, str], wanted: dict[str, str]) -> None:
        assert found.keys() == wanted.keys()
        wrong = {case: how for case, how in found.items() if how != wanted[case]}
        record_property("cases", len(found))
        record_property("failures", len(wrong))
        assert not wrong

    return held


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("matrix")
    create_authority(root / "ca", "cofuse")
    own = certificates.issued(root / "ca", root / "tls", "coordinator", "coordinator")
    config = CoordinatorConfig(
        listen="127.0.0.1:0",
        engine_listen="127.0.0.1:0",
        enroll_listen="127.0.0.1:0",
        authority=root / "ca",
        data_dir=root / "data",
        tls=TlsConfig(ca=own.ca, certificate=own.certificate, key=own.key),
    )
    with pytest.MonkeyPatch.context() as patch, serving(config) as running:
        patch.setattr(Rates, "take", lambda *_: True)  # these calls come faster than anybody's
        yield Hub(root, running)


@pytest.mark.parametrize("role", MEMBERS)
def test_a_valid_certificate_may_call_what_the_table_grants_and_nothing_else(
    hub: Hub, hold: Hold, role: Role
) -> None:
    wanted = {m: GRANTED if role in roles else "not_allowed" for m, roles in ROLES.items()}
    hold(hub.asks(hub.files("valid", role)), wanted)


def test_what_the_door_refuses_is_on_the_audit_chain_once_for_each_kind(hub: Hub) -> None:
    files = hub.files("refused", "participant")
    for _ in range(3):
        hub.asks(files)
    caller = leaf_of(files.certificate.read_bytes()).identity.uri
    wanted = {(m, "not_allowed") for m, roles in ROLES.items() if "participant" not in roles}

    def refused() -> list[tuple[str, str]]:
        with hub.running.store.database.read() as db:
            records = [read_record(line) for line in lines(db)]
        mine = [r for r in records if (r["act"], r["actor"]) == (REFUSED, caller)]
        return [(r["obj"], r["data"]["error"]) for r in mine]

    _wait_until(lambda: set(refused()) >= wanted)
    assert sorted(refused()) == sorted(wanted)


def test_a_revoked_certificate_may_call_nothing_also_on_a_connection_made_before(
    hub: Hub, hold: Hold
) -> None:
    revocations = Revocations(hub.running.store.database)
    with ExitStack() as stack:
        channels = {}
        for role in MEMBERS:
            files = hub.files("revoked", role)
            channel = channels[role] = stack.enter_context(dial(hub.running.address, files))
            assert GRANTED in {ends(channel, method) for method in ROLES}
            identity = leaf_of(files.certificate.read_bytes()).identity
            revocations.revoke_all_of(identity, "test")
        for channel in channels.values():
            _wait_until(lambda channel=channel: ends(channel, STAT) == "revoked")
            hold({method: ends(channel, method) for method in ROLES}, all_("revoked"))


@pytest.mark.parametrize("role", MEMBERS)
@pytest.mark.parametrize("state", [s for s in MAKE if s not in ("valid", "refused", "revoked")])
def test_any_other_certificate_gets_no_connection(
    hub: Hub, hold: Hold, role: Role, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    hold(hub.asks(hub.files(state, role)), all_(NO_CONNECTION))
    assert "rpc." not in caplog.text


def test_nobody_gets_a_connection_without_a_certificate(hub: Hub, hold: Hold) -> None:
    hold(_without_certificate(hub, hub.running.address), all_(NO_CONNECTION))


def test_the_coordinators_own_certificate_is_no_callers(hub: Hub, hold: Hold) -> None:
    own = TlsFiles(
        ca=hub.authority / "ca.pem",
        certificate=hub.root / "tls" / "certificate.pem",
        key=hub.root / "tls" / "key.pem",
    )
    hold(hub.asks(own), all_(NO_CONNECTION))


def test_the_enrolment_port_answers_what_the_table_grants_anybody_and_knows_no_other_service(
    hub: Hub, hold: Hold
) -> None:
    granted = {"/cofuse.v1.Enroll/Authority", "/cofuse.v1.Enroll/Redeem"}
    assert granted == {method for method, roles in ROLES.items() if ANYBODY in roles}
    wanted = all_("UNIMPLEMENTED") | dict.fromkeys(granted, GRANTED)
    wanted["/cofuse.v1.Enroll/Renew"] = "not_allowed"
    hold(_without_certificate(hub, hub.running.enroll_address), wanted)


def all_(how: str) -> dict[str, str]:
    """Every call ends alike."""
    return dict.fromkeys(ROLES, how)


def _without_certificate(hub: Hub, address: str) -> dict[str, str]:
    credentials = grpc.ssl_channel_credentials((hub.authority / "ca.pem").read_bytes())
    with closing(grpc.secure_channel(address, credentials)) as channel:
        return {method: ends(channel, method) for method in ROLES}


def _wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10.0
    while not true():
        assert time.monotonic() < deadline, "not within 10 s"
        time.sleep(0.05)
