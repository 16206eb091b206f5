"""The institution's own page: nobody without the link, decisions as the command line makes them."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from participant.approvals import Approvals, Release
from participant.config import load_config
from participant.egress import FOLDER, EgressLog
from participant.page.app import Desk, build
from participant.status import PAUSED
from protos.public_sets import Prompt, write_prompts
from tests.participant.settings import write_settings

RELEASE = Release(
    round_id="rnd-1",
    purpose="general",
    submitted_by="ada",
    kind="logits",
    rule="rule 1",
    top_k=16,
    positions=1234,
    size_bytes=5678,
    sha256="ab" * 32,
    scores=True,
    asked_unix_ms=0,
)


@dataclass
class Page:
    desk: Desk
    client: TestClient
    release: Release

    def post(self, address: str, **fields: str) -> Any:
        token = re.search(r'name="form" value="([^"]+)"', self.client.get("/").text)
        assert token is not None
        return self.client.post(address, data={"form": token[1], **fields})


@pytest.fixture
def page(tmp_path: Path) -> Page:
    write_settings(tmp_path)
    (tmp_path / "policy.toml").write_text("version = 2\n")
    data = tmp_path / "data"
    (data / "rounds" / "rnd-1").mkdir(parents=True)
    prompts = [Prompt(text=f"<b>text {n}</b>", domain=None) for n in range(20)]
    write_prompts(data / "rounds" / "rnd-1" / "prompts.jsonl", prompts)
    desk = Desk(load_config(tmp_path / "participant.toml"), "carol")
    release = RELEASE.model_copy(update={"asked_unix_ms": time.time_ns() // 1_000_000})
    Approvals(data / "approvals").ask(release)
    log = EgressLog(data, "st-mary")
    log.append(round_id="rnd-0", what="logits", size_bytes=4242, sha256="cd" * 32, rule="rule 1")
    log.refuse(round_id="rnd-0", what="weights", why="no rule <i>allows</i> it")
    log.close()
    client = TestClient(
        build(desk),
        base_url="http://127.0.0.1:8081",
        headers={"origin": "http://127.0.0.1:8081"},
        follow_redirects=False,
    )
    assert client.get(f"/?key={desk.key}").status_code == 303
    return Page(desk, client, release)


def test_nobody_without_the_link_sees_or_does_anything(page: Page) -> None:
    stranger = TestClient(
        build(page.desk),
        base_url="http://127.0.0.1:8081",
        headers={"origin": "http://127.0.0.1:8081"},
        follow_redirects=False,
    )
    address = f"/releases/{page.release.release_id}"
    assert stranger.get("/").status_code == 403
    assert stranger.get("/?key=wrong").status_code == 403
    assert stranger.get(address).status_code == 403
    fields = {"decision": "approve", "sha256": page.release.sha256, "form": "x"}
    assert stranger.post(address, data=fields).status_code == 403
    assert page.client.post(address, data=fields).status_code == 403  # no token of the page
    assert page.desk.approvals.decision(page.release) is None


def test_it_tells_what_waits_and_what_left(page: Page) -> None:
    text = page.client.get("/").text
    for words in (page.release.release_id, "4,242", "No daemon runs", "&lt;i&gt;allows&lt;/i&gt;"):
        assert words in text, words
    shown = page.client.get(f"/releases/{page.release.release_id}").text
    for words in ("1,234", "top 16 log-probabilities", page.release.sha256, "&lt;b&gt;text"):
        assert words in shown, words


def test_it_shows_whatever_a_daemon_says_of_itself(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of another release, that says less."""
    said = {"phase": "training", "attending": True, "expert_steps": 77_000, "alarm": "went back"}
    for status in (said, {}):
        monkeypatch.setattr("participant.page.app.read_status", lambda _, found=status: found)
        assert page.client.get("/").status_code == 200
        assert ("77,000 steps" in page.client.get("/").text) is bool(status)


def test_a_release_is_approved_in_the_name_of_whoever_runs_the_page(page: Page) -> None:
    address = f"/releases/{page.release.release_id}"
    other = page.post(address, decision="approve", sha256="00" * 32)
    assert other.status_code == 409  # not the bytes that wait
    assert page.post(address, decision="approve", sha256=page.release.sha256).status_code == 303
    decision = page.desk.approvals.decision(page.release)
    assert decision is not None
    assert (decision.approved, decision.by) == (True, "carol")
    assert page.client.get(address).status_code == 409  # decided, and final


def test_a_refusal_needs_its_reason(page: Page) -> None:
    address = f"/releases/{page.release.release_id}"
    fields = {"decision": "refuse", "sha256": page.release.sha256}
    assert page.post(address, **fields, why="  ").status_code == 409
    assert page.post(address, **fields, why="not this month").status_code == 303
    decision = page.desk.approvals.decision(page.release)
    assert decision is not None
    assert (decision.approved, decision.why) == (False, "not this month")


def test_pause_and_resume_are_the_file_that_the_daemon_looks_at(page: Page) -> None:
    flag = page.desk.config.data_dir / PAUSED
    assert page.post("/pause").status_code == 303
    assert flag.exists()
    assert "Resume" in page.client.get("/").text
    assert page.post("/resume").status_code == 303
    assert not flag.exists()


def test_the_record_is_checked_and_a_change_is_seen(page: Page) -> None:
    assert "The record is whole" in page.post("/verify").text
    [segment] = (page.desk.config.data_dir / FOLDER).glob("0*.jsonl")
    segment.write_bytes(segment.read_bytes().replace(b"4242", b"4241"))
    assert "The record is broken" in page.post("/verify").text
