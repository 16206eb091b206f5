"""An order is its submitter's, for one thing, while it counts."""

import base64
import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trust.ca import create_authority, new_identity, sign_request
from trust.canonical import canonical
from trust.identity import Role
from trust.orders import MAX_LIFETIME, open_order, open_promotion, sign_as
from trust.pivot_manifest import utc
from trust.statements import Order, Promotion, StatementError

# Certificates are made when a test runs, which may be long after this file was read.
NOW = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=1)


@dataclass(frozen=True)
class Home:
    """An authority, and identities that it certified."""

    root: Path

    @property
    def authority(self) -> bytes:
        return (self.root / "ca" / "ca.pem").read_bytes()

    def identity(self, role: Role, name: str) -> Path:
        folder = self.root / f"{role}-{name}"
        if not folder.exists():
            request = new_identity(folder, role, name)
            pem = sign_request(self.root / "ca", request, role=role, name=name, days=3)
            (folder / "certificate.pem").write_bytes(pem)
        return folder

    def sign(self, folder: Path, **changes: Any) -> str:
        return sign_as(order(**changes), folder / "key.pem", folder / "certificate.pem")


def order(**changes: Any) -> Order:
    values: dict[str, Any] = {
        "sha256": "0" * 64,
        "spec": '{"name": "first"}',
        "recurring": False,
        "submitted_by": "cofuse://researcher/ada",
        "nonce": "n-1",
        "issued": utc(NOW),
        "not_after": utc(NOW + timedelta(hours=1)),
    }
    return Order(**{**values, **changes})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    root = tmp_path_factory.mktemp("orders")
    create_authority(root / "ca", "test")
    return Home(root)


def test_what_was_ordered_is_read_back_by_who_trusts_the_authority(home: Home) -> None:
    raw = home.sign(home.identity("researcher", "ada"))
    assert open_order(raw, home.authority, NOW) == order()


@pytest.mark.parametrize(
    ("role", "name", "changes", "says"),
    [
        ("researcher", "eve", {}, "signed by cofuse://researcher/eve"),
        ("participant", "ada", {"submitted_by": "cofuse://participant/ada"}, "submit no round"),
        ("researcher", "ada", {"not_after": utc(NOW - timedelta(seconds=1))}, "it counted until"),
        ("researcher", "ada", {"issued": utc(NOW + timedelta(hours=1))}, "set the clock"),
        ("researcher", "ada", {"issued": utc(NOW - timedelta(days=9))}, "did not count"),
        ("researcher", "ada", {"not_after": utc(NOW + 2 * MAX_LIFETIME)}, "for longer than"),
        ("researcher", "ada", {"not_after": "2027-02-31T00:00:00Z"}, "wanted one that exists"),
    ],
)
def test_an_order_that_does_not_count_is_refused(
    home: Home, role: Role, name: str, changes: dict[str, Any], says: str
) -> None:
    raw = home.sign(home.identity(role, name), **changes)
    with pytest.raises(StatementError, match=says):
        open_order(raw, home.authority, NOW)


def test_another_authoritys_certificate_proves_nothing(home: Home, tmp_path: Path) -> None:
    create_authority(tmp_path / "ca", "test")
    other = Home(tmp_path)
    raw = other.sign(other.identity("researcher", "ada"))
    with pytest.raises(StatementError, match=r"our ca\.pem did not sign"):
        open_order(raw, home.authority, NOW)


def test_a_certificate_of_ours_beside_a_foreign_signature_proves_nothing(
    home: Home, tmp_path: Path
) -> None:
    thief = new_identity(tmp_path / "thief", "researcher", "ada")
    assert thief
    raw = sign_as(
        order(),
        tmp_path / "thief" / "key.pem",
        home.identity("researcher", "ada") / "certificate.pem",
    )
    with pytest.raises(StatementError, match="did not sign"):
        open_order(raw, home.authority, NOW)


def test_a_word_changed_on_the_way_is_noticed(home: Home) -> None:
    envelope = json.loads(home.sign(home.identity("researcher", "ada")))
    payload = base64.b64decode(envelope["payload"]).replace(b"first", b"worst")
    envelope["payload"] = base64.b64encode(payload).decode()
    with pytest.raises(StatementError, match="did not sign"):
        open_order(canonical(envelope).decode(), home.authority, NOW)


@pytest.fixture(scope="module")
def good(home: Home) -> str:
    return home.sign(home.identity("researcher", "ada"))


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_foreign_text_is_refused_and_never_crashes(
    home: Home, good: str, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, len(good) - 1))
    text = data.draw(st.text(max_size=30))
    for raw in (text, good[:start] + text + good[start + 1 :], good[:start]):
        if raw != good:
            with pytest.raises(StatementError):
                open_order(raw, home.authority, NOW)


def promoted(home: Home, role: Role, **changes: str) -> str:
    """A yes to pivot-3 under the identity grace."""
    values = {
        "sha256": "c" * 64,
        "pivot": "pivot-3",
        "by": "cofuse://operator/grace",
        "issued": utc(NOW),
    }
    folder = home.identity(role, "grace")
    statement = Promotion(**{**values, **changes})
    return sign_as(statement, folder / "key.pem", folder / "certificate.pem")


def test_an_operators_yes_to_a_pivot_is_read_back(home: Home) -> None:
    found = open_promotion(promoted(home, "operator"), home.authority, NOW)
    assert (found.pivot, found.sha256, found.by) == ("pivot-3", "c" * 64, "cofuse://operator/grace")


@pytest.mark.parametrize(
    ("role", "changes", "says"),
    [
        ("operator", {"by": "cofuse://operator/heinz"}, "signed by cofuse://operator/grace"),
        ("researcher", {"by": "cofuse://researcher/grace"}, "promote no pivot"),
        ("operator", {"issued": utc(NOW + timedelta(hours=1))}, "set the clock"),
        ("operator", {"issued": utc(NOW - timedelta(days=9))}, "did not count"),
    ],
)
def test_a_promotion_that_does_not_count_is_refused(
    home: Home, role: Role, changes: dict[str, str], says: str
) -> None:
    with pytest.raises(StatementError, match=says):
        open_promotion(promoted(home, role, **changes), home.authority, NOW)


def test_an_order_is_no_promotion_whoever_signed_it(home: Home) -> None:
    folder = home.identity("operator", "grace")
    raw = home.sign(folder, submitted_by="cofuse://operator/grace")
    with pytest.raises(StatementError, match="promotion"):
        open_promotion(raw, home.authority, NOW)
