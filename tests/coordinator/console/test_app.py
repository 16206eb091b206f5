"""Who may see and do what in the console, and that nothing else gets in."""

import hashlib
import io
import json
import tarfile

import pytest
from starlette.testclient import TestClient

from coordinator.console.app import TRIES_BURST
from coordinator.happenings import Committed, Reported
from tests.coordinator.console.conftest import EVALS, PASSWORD, World, post

PAGES = ("/", "/evals", "/pivots", "/participants", "/participants/north", "/audit", "/audit.jsonl")
OPERATORS = ("/audit", "/audit.jsonl")


def test_nobody_sees_anything_without_signing_in(world: World) -> None:
    client = world.browser()
    round_id = world.round()
    for page in (*PAGES, f"/rounds/{round_id}", "/news", "/pivots/pivot-0.tar"):
        answer = client.get(page)
        assert (answer.status_code, answer.headers["location"][:6]) == (303, "/login"), page
    assert client.get("/login").status_code == 200
    assert client.post(f"/rounds/{round_id}/cancel").status_code == 303
    assert world.store.round(round_id).state == "SUBMITTED"


@pytest.mark.parametrize("name", ["grace", "ada"])
def test_each_role_sees_its_pages(world: World, name: str) -> None:
    client = world.browser(name)
    world.pivot("pivot-0", b"weights", evals=EVALS, card="# The card")
    one = world.collecting()
    world.store.note(
        one, "progress", {"phase": "train", "run": "u", "step": 5, "steps": 9, "loss": 2}
    )
    for page in (
        *PAGES,
        f"/rounds/{one}",
        "/evals?pivot=pivot-0",
        "/evals/pivot-0.csv",
        "/pivots/pivot-0",
    ):
        is_allowed = name == "grace" or page not in OPERATORS
        assert client.get(page).status_code == (200 if is_allowed else 403), page
    assert ('href="/audit"' in client.get("/").text) is (name == "grace")


def test_what_is_not_there_is_a_page_that_says_so(world: World) -> None:
    client = world.browser("ada")
    for page in ("/rounds/rnd-9", "/rounds/rnd-007", "/pivots/x", "/participants/x", "/none"):
        answer = client.get(page)
        assert answer.status_code == 404, page
        assert 'role="alert"' in answer.text, page
        assert answer.headers["content-security-policy"]


def test_an_operator_approves_and_the_chain_names_them(world: World) -> None:
    round_id = world.round()
    page = f"/rounds/{round_id}"
    assert post(world.browser("ada"), f"{page}/approve").status_code == 403
    assert world.store.round(round_id).state == "SUBMITTED"
    assert post(world.browser("grace"), f"{page}/approve").status_code == 303
    assert world.store.round(round_id).state == "APPROVED"
    assert "cofuse://operator/grace" in world.browser("grace").get("/audit.jsonl").text
    assert post(world.browser("grace"), f"{page}/approve").status_code == 409


def test_a_researcher_cancels_their_own_rounds_only(world: World) -> None:
    own, other = world.round("ada"), world.round("bob")
    client = world.browser("ada")
    assert "Cancel round" in client.get(f"/rounds/{own}").text
    assert "Cancel round" not in client.get(f"/rounds/{other}").text
    assert post(client, f"/rounds/{other}/cancel").status_code == 403
    assert post(client, f"/rounds/{own}/cancel").status_code == 303
    assert [world.store.round(one).state for one in (own, other)] == ["CANCELLED", "SUBMITTED"]


def test_a_form_without_its_own_token_changes_nothing(world: World) -> None:
    client, round_id = world.browser("grace"), world.round()
    text = world.browser("grace").get("/participants").text
    another = text.partition('name="form" value="')[2].partition('"')[0]
    for form in ("", "of-nobody", another):
        assert client.post(f"/rounds/{round_id}/cancel", data={"form": form}).status_code == 403
    assert world.store.round(round_id).state == "SUBMITTED"


def test_a_form_of_another_origin_changes_nothing(world: World) -> None:
    client = world.browser("grace")
    assert client.post("/logout", headers={"origin": "http://evil.example"}).status_code == 403
    assert client.get("/", headers={"host": "evil.example"}).status_code == 421


def test_wrong_passwords_are_slowed_down_and_names_are_not_told(world: World) -> None:
    client = world.browser()
    words = {
        name: client.post("/login", data={"name": name, "password": "wrong"}).text
        for name in ("ada", "nobody")
    }
    assert words["ada"] == words["nobody"]
    for _ in range(int(TRIES_BURST)):
        answer = client.post("/login", data={"name": "ada", "password": "wrong"})
    assert answer.status_code == 429
    right = client.post("/login", data={"name": "ada", "password": PASSWORD})
    assert right.status_code == 429


def test_signing_in_leads_nowhere_else(world: World) -> None:
    for after in ("//evil.example", "/\\evil.example", "https://evil.example", "x"):
        data = {"name": "ada", "password": PASSWORD, "after": after}
        assert world.browser().post("/login", data=data).headers["location"] == "/", after


def test_sessions_end_with_password_user_and_revocation(world: World) -> None:
    changed, removed, revoked = (world.browser(name) for name in ("ada", "bob", "grace"))
    world.desk.users.add("ada", "researcher", PASSWORD)
    assert changed.get("/").status_code == 303
    world.desk.users.remove("bob")
    assert removed.get("/").status_code == 303
    assert post(revoked, "/participants/revoke", role="operator", name="grace").status_code == 303
    world.desk.members.refresh()
    assert revoked.get("/").status_code == 403
    again = revoked.post("/login", data={"name": "grace", "password": PASSWORD})
    assert again.status_code == 403


def test_a_token_is_shown_once_and_becomes_an_invitation(world: World) -> None:
    client = world.browser("grace")
    form = {"role": "participant", "name": "lakeside", "hours": "24"}
    shown = post(client, "/participants/invite", **form).text
    assert "cofuse join 127.0.0.1:7444" in shown
    page = client.get("/participants").text
    assert "participant/lakeside" in page
    assert "cofuse join" not in page
    for wrong in ({"role": "coordinator"}, {"name": "No Such"}, {"hours": "9999"}):
        assert post(client, "/participants/invite", **{**form, **wrong}).status_code == 400
    assert post(world.browser("ada"), "/participants/invite", **form).status_code == 403


def test_what_others_say_is_shown_as_text(world: World) -> None:
    evil = '"><script>alert(1)</script>'
    round_id = world.collecting(name=evil)
    world.store.step(round_id, Reported("north", None, "refused", evil, "{}"))
    client = world.browser("grace")
    for page in ("/", f"/rounds/{round_id}", "/audit"):
        assert "<script>alert" not in client.get(page).text, page


def test_receipts_and_the_check_of_the_chain(world: World) -> None:
    round_id = world.collecting()
    digest = hashlib.sha256(b"x").hexdigest()
    world.store.step(round_id, Committed("north", digest, 123_456))
    client = world.browser("grace")
    page = client.get("/audit").text
    assert digest[:16] in page
    assert "123,456" in page
    assert "The chain is whole" in post(client, "/audit/verify").text
    with world.store.database.write() as db:
        from sqlalchemy import text

        db.execute(text("UPDATE audit SET line = replace(line, 'north', 'south')"))
    assert "The chain is broken" in post(client, "/audit/verify").text


def test_a_pivot_comes_home_whole(world: World) -> None:
    world.pivot("pivot-0", b"w" * 1500, evals=EVALS, card="# Card\n\n| a |\n|--:|\n| 1 |\n")
    client = world.browser("ada")
    page = client.get("/pivots/pivot-0").text
    assert "<h1>Card</h1>" in page
    with tarfile.open(fileobj=io.BytesIO(client.get("/pivots/pivot-0.tar").content)) as archive:
        assert sorted(archive.getnames()) == ["pivot-0/README.md", "pivot-0/model.safetensors"]
        member = archive.extractfile("pivot-0/model.safetensors")
        assert member is not None
        assert member.read() == b"w" * 1500
    assert client.get("/pivots/pivot-0/files/model.safetensors").content == b"w" * 1500
    assert client.get("/pivots/pivot-0/files/..%2Fdb.sqlite").status_code == 404
    assert json.loads(client.get("/evals/pivot-0.json").content) == EVALS


def test_a_pivot_of_preferences_is_measured_and_says_who_was_turned_down(world: World) -> None:
    judged = {"agrees": 0.9, "margin": 0.25, "stronger": 0.5, "share": 0.75, "turned": 1.0}
    loud = {**judged, "agrees": 0.1, "turned": 0.0125}
    held_out = {"base": {"cardio": 0.5}, "preference": {"cardio": 0.75}}
    evals = {
        "pivot": "preference",
        "preference": held_out,
        "pairs": {"held_out": {"cardio": 40}},
        "credit": {"judgement": {"north": judged, "st-mary": loud}},
    }
    world.pivot("pivot-0", b"weights", evals=evals)
    page = world.browser("ada").get("/evals").text
    assert "Held-out pairs whose chosen answer it prefers" in page
    assert "95 % interval" in page
    assert "0.0125</strong>" in page
    training = {"steps": 3, "lr": 0.1, "batch_size": 4, "seq_len": 128}
    round_id = world.round(kind="pairs", method="preference", training=training)
    assert "3 steps of 4 pairs" in world.browser("ada").get(f"/rounds/{round_id}").text


def test_the_list_filters_and_says_what_waits(world: World) -> None:
    waiting, over = world.round(), world.round()
    post(world.browser("grace"), f"/rounds/{over}/cancel")
    client: TestClient = world.browser("ada")
    assert "1 round waits" in client.get("/").text
    assert waiting not in client.get("/?show=ended+badly").text
    assert over in client.get("/?show=ended+badly").text
