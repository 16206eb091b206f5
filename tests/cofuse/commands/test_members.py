"""Promises of `cofuse coordinator revoke | invite` and `cofuse join`: words and exit statuses."""

import time
from pathlib import Path

import pytest

from coordinator.config import load_config
from coordinator.revocations import Revocations
from coordinator.store import Store
from coordinator.wiring import serving
from participant.config import load_config as load_participant
from participant.policy import load_policy
from tests.cofuse.command_line import run
from trust.ca import new_identity, sign_request
from trust.identity import Identity, Leaf, fingerprint
from trust.tokens import Token, new_token, parse_token


@pytest.fixture
def home(tmp_path: Path) -> Path:
    assert run("coordinator", "init", tmp_path / "hub")[0] == 0
    return tmp_path / "hub"


def revokes(home: Path, identity: Identity, serial: int) -> bool:
    store = Store.at(home / "data" / "coordinator.sqlite")
    listed = Revocations(store.database)
    listed.refresh()
    found = listed.revokes(Leaf(identity, serial, 0.0, 1e12, calls=True))
    store.close()
    return found


ANNA = Identity("participant", "st-anna")
ADA = Identity("researcher", "ada")


def test_a_name_and_serials_are_revoked_before_the_first_start_too(home: Path) -> None:
    assert run("coordinator", "revoke", home, "--name", "participant/st-anna")[0] == 0
    for serial in ("255", "0x1A"):
        assert run("coordinator", "revoke", home, "--serial", serial, "--why", "lost")[0] == 0
    other = Identity("participant", "st-mary")
    assert revokes(home, ANNA, 1)
    assert revokes(home, other, 255)
    assert revokes(home, other, 26)
    assert not revokes(home, other, 1)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "none or both"),
        (("--name", "participant/a", "--serial", "1"), "none or both"),
        (("--name", "st-anna"), "as participant/NAME"),
        (("--name", "root/st-anna"), "wanted one of participant"),
        (("--serial", "1A"), "wanted decimal digits"),
    ],
)
def test_what_names_nobody_is_refused_in_words(
    home: Path, words: tuple[str, ...], says: str
) -> None:
    status, _, said = run("coordinator", "revoke", home, *words)
    assert status == 2
    assert says in said


def test_an_invitation_needs_a_port_where_it_is_redeemed(home: Path) -> None:
    words = ("--role", "participant", "--name", "st-anna")
    status, _, said = run("coordinator", "invite", home, *words)
    assert status == 2
    assert "no enroll_listen" in said


def test_an_invitation_prints_a_token_and_nothing_else(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    assert run("coordinator", "init", hub, "--enroll-listen", "127.0.0.1:7444")[0] == 0
    words = ("--role", "participant", "--name", "st-anna", "--ttl", "2d")
    status, out, said = run("coordinator", "invite", hub, *words)
    assert status == 0
    token = parse_token(out)
    assert token.identity == ANNA
    assert token.authority == fingerprint((hub / "ca" / "ca.pem").read_bytes())
    assert token.secret not in said


@pytest.mark.parametrize(
    ("listen", "role", "words"),
    [
        ("0.0.0.0:7443", "operator", "cofuse join fuse.example.org:7444 TOKEN FOLDER"),
        (
            "0.0.0.0:443",
            "participant",
            "cofuse join fuse.example.org:7444 TOKEN FOLDER --corpus NOTES.jsonl "
            "--coordinator fuse.example.org:443",
        ),
    ],
)
def test_an_invitation_says_the_command_that_will_work_elsewhere(
    tmp_path: Path, listen: str, role: str, words: str
) -> None:
    ports = ("--listen", listen, "--enroll-listen", "0.0.0.0:7444")
    run("coordinator", "init", tmp_path / "hub", "--host", "fuse.example.org", *ports)
    status, _, said = run(
        "coordinator", "invite", tmp_path / "hub", "--role", role, "--name", "ada"
    )
    assert status == 0
    assert said.strip().endswith(words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--role", "root", "--name", "a"), "wanted one of participant"),
        (("--role", "coordinator", "--name", "a"), "wanted participant, researcher or operator"),
        (("--role", "operator", "--name", "A"), "wanted 1 to 40"),
        (("--role", "operator", "--name", "a", "--ttl", "soon"), "such as 1h"),
    ],
)
def test_an_invitation_of_nobody_is_refused_in_words(
    tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    hub = tmp_path / "hub"
    run("coordinator", "init", hub, "--enroll-listen", "127.0.0.1:7444")
    status, _, said = run("coordinator", "invite", hub, *words)
    assert status == 2
    assert says in said


@pytest.mark.parametrize(
    ("address", "token", "says"),
    [("nowhere", "x", "wanted host:port"), ("127.0.0.1:1", "cofuse1.x", "no join token")],
)
def test_joining_with_what_is_no_token_is_refused_in_words(
    tmp_path: Path, address: str, token: str, says: str
) -> None:
    status, _, said = run("join", address, token, tmp_path)
    assert status == 2
    assert says in said


def test_from_an_invitation_to_a_renewed_certificate_and_its_end(tmp_path: Path) -> None:
    """The way of one member, in the words of the command line."""
    hub, own = tmp_path / "hub", tmp_path / "own"
    ports = ("listen", "engine-listen", "ops-listen", "enroll-listen")
    run("coordinator", "init", hub, *(w for p in ports for w in (f"--{p}", "127.0.0.1:0")))
    with serving(load_config(hub / "coordinator.toml")) as running:
        words = ("--role", "researcher", "--name", "ada")
        token = run("coordinator", "invite", hub, *words)[1].strip()
        assert run("join", running.enroll_address, token, own)[0] == 0
        at = ("--at", running.address, "--identity", own)
        assert run("round", "ls", *at)[0] == 0
        first = (own / "certificate.pem").read_bytes()
        # A later end is what a renewal is for: whole seconds, so the first one is made shorter.
        request = (own / "request.csr").read_bytes()
        short = sign_request(hub / "ca", request, role="researcher", name="ada", days=1)
        (own / "certificate.pem").write_bytes(short)
        assert run("renew", *at)[0] == 0
        assert (own / "certificate.pem").read_bytes() not in (first, short)
        assert run("coordinator", "revoke", hub, "--name", "researcher/ada")[0] == 0
        deadline = time.monotonic() + 10.0
        while (found := run("round", "ls", *at))[0] == 0:
            assert time.monotonic() < deadline
        assert "[revoked]" in found[2]
        status, _, said = run("join", running.enroll_address, token, tmp_path / "again")
        assert status == 4
        assert "has been used" in said


def test_who_joined_first_is_set_up_afterwards_under_the_same_name_only(
    home: Path, tmp_path: Path
) -> None:
    """What `cofuse join` leaves is a key and its certificate; init keeps both."""
    site = tmp_path / "site"
    request = new_identity(site, "participant", "st-anna")
    signed = sign_request(home / "ca", request, role="participant", name="st-anna")
    (site / "certificate.pem").write_bytes(signed)
    key = (site / "key.pem").read_bytes()
    corpus = tmp_path / "notes.jsonl"
    corpus.write_text('{"text": "Patient 1 rests well."}\n', encoding="utf-8")
    words = ("participant", "init", site, "--coordinator", "hub:1", "--corpus", corpus, "--name")
    code, _, err = run(*words, "north")
    assert (code, "wanted cofuse://participant/north" in err) == (2, True)
    assert not (site / "participant.toml").exists()
    assert run(*words, "st-anna")[0] == 0
    assert (site / "key.pem").read_bytes() == key
    assert (site / "policy.toml").exists()
    before = (site / "participant.toml").read_bytes()
    assert run(*words, "st-anna")[0] == 2
    assert (site / "participant.toml").read_bytes() == before


def test_a_join_with_text_lays_the_folder_out_and_a_wrong_one_costs_no_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes over the wire is tests/integration/test_joining.py's."""
    spent: list[Path] = []

    def redeem(_address: str, _token: Token, folder: Path) -> None:
        folder.mkdir()
        spent.append(folder)

    monkeypatch.setattr("cofuse.joining.join", redeem)
    notes = tmp_path / "notes.jsonl"
    notes.write_text('{"text": "Patient 1 rests well."}\n')
    token, site = new_token(ANNA, "ab" * 32), tmp_path / "site"
    for odd, corpus in ((token, tmp_path / "none"), (new_token(ADA, "ab" * 32), notes)):
        assert run("join", "hub:7444", odd, site, "--corpus", corpus)[0] == 2
    assert spent == []
    assert run("join", "hub:7444", token, site, "--corpus", notes)[0] == 0
    found = load_participant(site / "participant.toml")
    assert (found.name, found.coordinator, found.corpus) == ("st-anna", "hub:7443", notes)
    assert load_policy(found.policy).allow[0].kinds == (), "nothing leaves before a person edits"
    assert run("join", "hub:7444", token, site, "--corpus", notes)[0] == 2, "never written over"
