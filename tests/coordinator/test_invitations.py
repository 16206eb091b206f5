"""An invitation becomes one certificate or none, whoever tries, how often, and when."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.invitations import AGAIN_MS, MAX_WRONG_TRIES, Invitations
from coordinator.store import Store
from protos.errors import CofuseError
from trust.identity import Identity
from trust.tokens import Token

ANNA = Identity("participant", "st-anna")
HOUR_S = 3600.0
ROUNDS = 100
"""Of the race: each is one invitation and four who redeem it at once."""


class Authority:
    """Counts what it issues."""

    def __init__(self) -> None:
        self.issued: list[tuple[Identity, bytes]] = []

    def __call__(self, identity: Identity, request: bytes) -> bytes:
        self.issued.append((identity, request))
        return b"certificate %d" % len(self.issued)


@pytest.fixture
def now() -> list[int]:
    return [1_000_000]


@pytest.fixture
def issue() -> Authority:
    return Authority()


@pytest.fixture
def invitations(now: list[int]) -> Invitations:
    return Invitations(Store("sqlite://").database, clock_ms=lambda: now[0])


def wrong(token: Token) -> str:
    return ("A" if token.secret[0] != "A" else "B") + token.secret[1:]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(CofuseError) as caught:
        call()
    assert caught.value.error_id == "bad_invitation"
    return caught.value.says


def test_it_becomes_the_certificate_of_whom_the_operator_named(
    invitations: Invitations, issue: Authority
) -> None:
    token = invitations.invite(ANNA, "ab" * 32, HOUR_S)
    assert invitations.redeem(token.invitation, token.secret, b"csr", issue) == b"certificate 1"
    assert issue.issued == [(ANNA, b"csr")]


def test_a_lost_answer_is_given_again_to_the_same_request_for_ten_minutes(
    invitations: Invitations, issue: Authority, now: list[int]
) -> None:
    token = invitations.invite(ANNA, "ab" * 32, HOUR_S)
    redeem = invitations.redeem
    first = redeem(token.invitation, token.secret, b"csr", issue)
    now[0] += AGAIN_MS - 1
    assert redeem(token.invitation, token.secret, b"csr", issue) == first
    assert "used" in refusal(lambda: redeem(token.invitation, token.secret, b"other", issue))
    now[0] += 1
    assert "used" in refusal(lambda: redeem(token.invitation, token.secret, b"csr", issue))
    assert len(issue.issued) == 1


def test_it_ends_at_its_time(invitations: Invitations, issue: Authority, now: list[int]) -> None:
    token = invitations.invite(ANNA, "ab" * 32, 60.0)
    now[0] += 60_000
    says = refusal(lambda: invitations.redeem(token.invitation, token.secret, b"csr", issue))
    assert "expired" in says
    assert issue.issued == []


def test_five_wrong_secrets_lock_it_and_say_nothing_else(
    invitations: Invitations, issue: Authority
) -> None:
    token = invitations.invite(ANNA, "ab" * 32, HOUR_S)
    redeem = invitations.redeem
    said = {
        refusal(lambda: redeem(token.invitation, wrong(token), b"csr", issue))
        for _ in range(MAX_WRONG_TRIES)
    }
    said.add(refusal(lambda: redeem("0" * 16, token.secret, b"csr", issue)))
    assert len(said) == 1, "an unknown number and a wrong secret sound the same"
    assert "locked" in refusal(lambda: redeem(token.invitation, token.secret, b"csr", issue))
    assert issue.issued == []


def test_four_wrong_secrets_do_not_lock_it(invitations: Invitations, issue: Authority) -> None:
    token = invitations.invite(ANNA, "ab" * 32, HOUR_S)
    for _ in range(MAX_WRONG_TRIES - 1):
        refusal(lambda: invitations.redeem(token.invitation, wrong(token), b"csr", issue))
    assert invitations.redeem(token.invitation, token.secret, b"csr", issue)


def test_a_request_that_cannot_be_signed_leaves_it_as_it_was(
    invitations: Invitations, issue: Authority
) -> None:
    token = invitations.invite(ANNA, "ab" * 32, HOUR_S)

    def refuse(_identity: Identity, _request: bytes) -> bytes:
        raise CofuseError("bad_request", "no request")

    with pytest.raises(CofuseError, match="no request"):
        invitations.redeem(token.invitation, token.secret, b"junk", refuse)
    assert invitations.redeem(token.invitation, token.secret, b"csr", issue)


def test_a_token_of_one_role_is_never_another_ones(
    invitations: Invitations, issue: Authority
) -> None:
    """The role is the invitation's; nothing that the caller says changes it."""
    token = invitations.invite(ANNA, "ab" * 32, HOUR_S)
    other = invitations.invite(Identity("operator", "grace"), "ab" * 32, HOUR_S)
    refusal(lambda: invitations.redeem(other.invitation, token.secret, b"csr", issue))
    invitations.redeem(token.invitation, token.secret, b"csr", issue)
    assert [identity for identity, _ in issue.issued] == [ANNA]


def test_postgres_keeps_the_same_promises(
    new_postgres: Callable[[], str], issue: Authority
) -> None:
    invitations = Invitations(Store(new_postgres()).database)
    token = invitations.invite(ANNA, "ab" * 32, HOUR_S)
    redeem = partial(invitations.redeem, token.invitation)
    refusal(lambda: redeem(wrong(token), b"csr", issue))
    assert redeem(token.secret, b"csr", issue) == redeem(token.secret, b"csr", issue)
    assert "used" in refusal(lambda: redeem(token.secret, b"other", issue))
    assert len(issue.issued) == 1


def test_the_database_never_holds_a_secret(tmp_path: Path, issue: Authority) -> None:
    store = Store.at(tmp_path / "db.sqlite")
    token = Invitations(store.database).invite(ANNA, "ab" * 32, HOUR_S)
    store.close()
    assert token.secret.encode() not in (tmp_path / "db.sqlite").read_bytes()


def test_it_outlives_the_process_and_so_does_its_use(tmp_path: Path, issue: Authority) -> None:
    def reopened() -> Invitations:
        return Invitations(Store.at(tmp_path / "db.sqlite").database)

    token = reopened().invite(ANNA, "ab" * 32, HOUR_S)
    assert reopened().redeem(token.invitation, token.secret, b"csr", issue)
    again = reopened()
    assert "used" in refusal(lambda: again.redeem(token.invitation, token.secret, b"other", issue))


def race(rounds: int) -> None:
    """Four with keys of their own redeem each token at one moment: one certificate each time."""
    invitations, issue = Invitations(Store("sqlite://").database), Authority()
    start = threading.Barrier(4)

    def redeem(token: Token, number: int) -> bool:
        start.wait(30)
        try:
            return bool(
                invitations.redeem(token.invitation, token.secret, b"csr %d" % number, issue)
            )
        except CofuseError:
            return False

    with ThreadPoolExecutor(4) as pool:
        for turn in range(1, rounds + 1):
            token = invitations.invite(ANNA, "ab" * 32, HOUR_S)
            won = list(pool.map(redeem, [token] * 4, range(4)))
            assert won.count(True) == 1
            assert len(issue.issued) == turn


def test_a_race_of_four_gives_exactly_one_certificate() -> None:
    race(ROUNDS)


@pytest.mark.slow
def test_ten_thousand_races_give_exactly_one_certificate_each() -> None:
    race(10_000)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["right", "wrong", "unknown"]),
        st.sampled_from([b"a", b"b"]),
        st.integers(0, 700_000),
    ),
    max_size=15,
)


def test_whatever_is_tried_when_at_most_one_certificate_comes_of_it() -> None:
    store = Store("sqlite://")

    @given(STEPS)
    @settings(max_examples=25, deadline=None)
    def check(steps: list[tuple[str, bytes, int]]) -> None:
        now, issue = [0], Authority()
        invitations = Invitations(store.database, clock_ms=lambda: now[0])
        token = invitations.invite(ANNA, "ab" * 32, 1800.0)
        given_out = set[bytes]()
        for how, request, wait_ms in steps:
            now[0] += wait_ms
            number = "f" * 16 if how == "unknown" else token.invitation
            secret = wrong(token) if how == "wrong" else token.secret
            try:
                given_out.add(invitations.redeem(number, secret, request, issue))
            except CofuseError:
                continue
            assert how == "right"
        assert len(issue.issued) <= 1
        assert len(given_out) == len(issue.issued)

    check()
