"""What the list of revocations promises: it lasts, and it reaches every process that reads it."""

from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import revocations
from coordinator.revocations import Revocations
from coordinator.store import Store
from protos.errors import CofuseError
from trust.identity import Identity, Leaf

ANNA = Identity("participant", "st-anna")
MARY = Identity("participant", "st-mary")


def leaf(identity: Identity = ANNA, serial: int = 1, issued_unix_s: float = 0.0) -> Leaf:
    return Leaf(identity, serial, issued_unix_s, 1e12, calls=True)


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The time in ms, to be set."""
    now = [1_000_000]
    monkeypatch.setattr(revocations, "now_unix_ms", lambda: now[0])
    return now


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_serial_is_one_certificate_for_ever(kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("new_postgres")() if kind == "postgres" else "sqlite://"
    listed = Revocations(Store(url).database)
    serial = 2**159 - 1  # the largest that X.509 knows
    for _ in range(2):
        listed.revoke_one(serial, "lost")
    assert listed.revokes(leaf(serial=serial))
    assert listed.revokes(leaf(MARY, serial, 1e11))
    assert not listed.revokes(leaf(serial=serial - 1))


def test_a_name_is_all_of_its_certificates_up_to_now_and_none_that_comes_later(
    at: list[int],
) -> None:
    listed = Revocations(Store("sqlite://").database)
    listed.revoke_all_of(ANNA, "lost")
    assert listed.revokes(leaf(issued_unix_s=0))
    assert listed.revokes(leaf(issued_unix_s=1000))
    assert not listed.revokes(leaf(issued_unix_s=1001))
    assert not listed.revokes(leaf(MARY))
    assert not listed.revokes(leaf(Identity("operator", ANNA.name)))
    at[0] = 2_000_000
    listed.revoke_all_of(ANNA, "lost again")
    assert listed.revokes(leaf(issued_unix_s=1001))


def test_nothing_that_is_revoked_ever_counts_again() -> None:
    """Whatever is revoked after it, and whatever the clock does meanwhile."""
    listed, dead = Revocations(Store("sqlite://").database), set[Leaf]()

    @given(st.lists(st.tuples(st.sampled_from([ANNA, MARY]), st.integers(0, 99)), max_size=5))
    @settings(max_examples=20)
    def check(steps: list[tuple[Identity, int]]) -> None:
        for identity, second in steps:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(revocations, "now_unix_ms", partial(int, second * 1000))
                listed.revoke_all_of(identity, "")
            dead.add(leaf(identity, issued_unix_s=second))
            assert all(listed.revokes(one) for one in dead)

    check()


def test_what_one_process_revokes_another_hears_of_at_its_next_look(tmp_path: Path) -> None:
    here, there = (Store.at(tmp_path / "db.sqlite") for _ in range(2))
    mine, other = Revocations(here.database), Revocations(there.database)
    for number in range(3):
        other.revoke_one(number, "lost")
        assert not mine.revokes(leaf(serial=number))
        mine.refresh()
        assert mine.revokes(leaf(serial=number))
    here.close()
    there.close()
    again = Revocations(Store.at(tmp_path / "db.sqlite").database)
    again.refresh()
    assert again.revokes(leaf(serial=2))


def test_a_database_that_cannot_be_read_takes_nothing_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store("sqlite://")
    listed = Revocations(store.database)
    listed.revoke_one(1, "lost")

    def gone() -> None:
        raise CofuseError("store_unavailable", "gone")

    monkeypatch.setattr(store.database, "read", gone)
    for _ in range(3):
        listed.refresh()
    assert listed.revokes(leaf())
    assert len(caplog.records) == 1, "said once, not each second"
