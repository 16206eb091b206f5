"""Who comes in at the door, and when that ends."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coordinator.admission import BURST, STRANGERS_BURST, Members, Strangers
from protos.errors import CofuseError
from tests.integration import certificates
from trust.ca import create_authority
from trust.identity import Leaf, leaf_of

JOIN = "/cofuse.v1.Fleet/Join"
REDEEM = "/cofuse.v1.Enroll/Redeem"


@dataclass
class Context:
    """A call, as far as the door looks."""

    certificate: bytes = b""
    address: str = "ipv4:10.0.0.1:5000"

    def auth_context(self) -> Any:
        return {"x509_pem_cert": [self.certificate]} if self.certificate else {}

    def peer(self) -> str:
        return self.address


class List:
    """A list of revocations that the test writes."""

    def __init__(self) -> None:
        self.serials = set[int]()

    def revokes(self, leaf: Leaf) -> bool:
        return leaf.serial in self.serials

    def refresh(self) -> None:
        pass


@pytest.fixture
def member(tmp_path: Path) -> bytes:
    create_authority(tmp_path / "ca", "test")
    files = certificates.issued(tmp_path / "ca", tmp_path / "a", "participant", "a", days=1)
    return files.certificate.read_bytes()


def refusal(admission: Members | Strangers, method: str, context: Context) -> str:
    """The error id, or nothing."""
    try:
        admission.admit(method, context)
    except CofuseError as error:
        return error.error_id
    return ""


def test_a_certificate_counts_until_its_last_second(member: bytes) -> None:
    now = [leaf_of(member).ends_unix_s]
    members = Members(clock=lambda: now[0])
    assert refusal(members, JOIN, Context(member)) == ""
    now[0] += 1
    assert refusal(members, JOIN, Context(member)) == "expired"


def test_a_revoked_certificate_is_told_so_whatever_it_calls(member: bytes) -> None:
    listed = List()
    members = Members(listed)
    assert refusal(members, JOIN, Context(member)) == ""
    listed.serials.add(leaf_of(member).serial)
    assert {refusal(members, m, Context(member)) for m in (JOIN, REDEEM, "/x")} == {"revoked"}


def test_who_shows_no_certificate_or_a_servers_is_nobody(tmp_path: Path, member: bytes) -> None:
    assert refusal(Members(), JOIN, Context()) == "no_identity"
    assert refusal(Members(), JOIN, Context(b"junk")) == "no_identity"
    wrong = certificates.for_servers(tmp_path / "ca", tmp_path / "b", "participant", "b")
    context = Context(wrong.certificate.read_bytes())
    assert refusal(Members(), JOIN, context) == "no_identity"


def test_calls_are_counted_by_member_and_by_a_strangers_address(member: bytes) -> None:
    members, strangers = Members(clock=lambda: 0.0), Strangers()
    found = [refusal(members, JOIN, Context(member)) for _ in range(int(BURST) + 100)]
    assert found[-1] == "too_many_calls"
    for port in range(int(STRANGERS_BURST)):
        assert refusal(strangers, REDEEM, Context(address=f"ipv4:10.0.0.1:{port}")) == ""
    assert refusal(strangers, REDEEM, Context(address="ipv4:10.0.0.1:9")) == "too_many_calls"
    assert refusal(strangers, REDEEM, Context(address="ipv4:10.0.0.2:9")) == ""


def test_a_stranger_may_call_nothing_that_a_member_may(member: bytes) -> None:
    assert refusal(Strangers(), JOIN, Context(member)) == "not_allowed"
    assert refusal(Members(), REDEEM, Context(member)) == "not_allowed"
