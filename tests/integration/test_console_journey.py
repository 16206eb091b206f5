"""Each role's way through the pages in real Chromium: nothing leaves the origin, nothing breaks a
rule, and what is clicked happens.
"""

import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.coordinator.console.conftest import EVALS, PASSWORD, World, authority, world
from tests.integration.chromium import CHROMIUM, Tab, chromium
from tests.integration.console_site import OPERATOR, RESEARCHER, Site, console_site, wait_for
from tests.integration.console_site import PASSWORD as SITE_PASSWORD
from web.server import WebServer

__all__ = ["authority", "world"]
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="found no chromium on the PATH, wanted one"),
    pytest.mark.timeout(600),
]
OpenTab = Callable[..., Tab]


@pytest.fixture(scope="module")
def open_tab() -> Iterator[OpenTab]:
    with chromium() as opening:
        yield opening


def test_an_operator_signs_in_looks_around_and_approves(world: World, open_tab: OpenTab) -> None:
    round_id = world.collecting()
    for step in (5, 10):
        body = {"phase": "train", "run": "unified", "step": step, "steps": 10, "loss": 3 / step}
        world.store.note(round_id, "progress", body)
    waiting = world.round(name="waits")
    world.pivot("pivot-0", b"weights", evals=EVALS, card="# Card\n\n| a |\n|--:|\n| 1 |\n")
    world.desk.config.console  # noqa: B018 - the app below is the one that the world serves
    server = WebServer(world.app, "127.0.0.1:0")
    server.start()
    try:
        tab = open_tab(server.url, color_scheme="dark")
        tab.sign_in("grace", PASSWORD)
        for page in ("/", f"/rounds/{round_id}", "/evals", "/participants", "/audit"):
            tab.go(page)
        tab.go(f"/rounds/{waiting}")
        tab.page.get_by_role("button", name="Approve").click()
        tab.page.locator("[aria-current=step]", has_text="approved").wait_for()
        assert world.store.round(waiting).state == "APPROVED"
        paint = tab.page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        assert paint < 10_000  # the goal is 1 s; this machine may be busy
        assert tab.sins == []
    finally:
        tab.context.close()
        server.stop()


@pytest.mark.slow
def test_a_federation_walked_by_every_role(tmp_path: Path, open_tab: OpenTab) -> None:
    with console_site(tmp_path) as site:
        operator, researcher = open_tab(site.url), open_tab(site.url, color_scheme="dark")
        operator.sign_in(OPERATOR, SITE_PASSWORD)
        researcher.sign_in(RESEARCHER, SITE_PASSWORD)
        _invite_and_join(site, operator)
        _round(site, operator, researcher)
        _read_results(researcher, tmp_path)
        _cancel(site, researcher)
        _revoke(site, operator)
        operator.go("/audit")
        operator.page.get_by_role("button", name="Check the chain").click()
        operator.page.get_by_text("The chain is whole").wait_for()
        assert operator.sins + researcher.sins == []


def _invite_and_join(site: Site, operator: Tab) -> None:
    operator.go("/participants")
    form = operator.page.locator("form[action='/participants/invite']")
    form.get_by_label("Name").fill("harbour")
    form.get_by_role("button").click()
    words = operator.page.locator("#token").inner_text().split()
    operator.sins.extend(_checked(operator))
    home = site.folder / "harbour"
    done = subprocess.run(
        [sys.executable, "-m", "cofuse.cli", *words[1:4], str(home)], capture_output=True, text=True
    )
    # The coordinator's configuration says port 0: the token is good, its address is not.
    assert done.returncode in (0, 1), done.stderr
    operator.go("/participants")
    operator.page.get_by_text("participant/harbour").wait_for()


def _round(site: Site, operator: Tab, researcher: Tab) -> None:
    """Submit, approve, watch it live while one participant's person says yes on its own page."""
    round_id = site.submit("logits-unified", name="journey")
    researcher.go("/")
    researcher.live()
    operator.go(f"/rounds/{round_id}")
    operator.page.get_by_role("button", name="Approve").click()
    researcher.page.locator(f"#r-{round_id} .s-collecting").wait_for()  # by itself: it is live
    researcher.go(f"/rounds/{round_id}")
    operator.go(f"/rounds/{round_id}")
    _approve_release(site, round_id)
    researcher.page.locator("#t-loss tbody tr").first.wait_for()  # the curves appear by themselves
    researcher.page.locator("h1 + .s-published").wait_for(timeout=240_000)
    researcher.settled()


def _approve_release(site: Site, round_id: str) -> None:
    asks = site.folder / site.plan.hospitals[2].name
    wait_for(lambda: any((asks / "data" / "approvals").glob(f"{round_id}-*")), site.federation)
    words = [sys.executable, "-m", "cofuse.cli", "participant", "page", str(asks), "--by", "carol"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        link = process.stdout.readline().strip()
        with_key = re.fullmatch(r"(http://127\.0\.0\.1:[0-9]+)(/\?key=.+)", link)
        assert with_key is not None
        from tests.integration.chromium import _tab  # a tab of the same browser

        opened = _tab(site_browser(), with_key[1], {})
        opened.go(with_key[2])
        opened.page.get_by_role("link", name="Look and decide").click()
        opened.settled()
        opened.page.get_by_role("button", name="Approve").click()
        opened.page.get_by_text("Nothing waits.").wait_for()
        assert opened.sins == []
        opened.context.close()
    finally:
        process.terminate()
        assert process.wait(20) == 0


def _read_results(researcher: Tab, folder: Path) -> None:
    page = researcher.page
    researcher.go("/evals")
    assert page.locator(".heat tbody tr").first.locator("th").inner_text().startswith("pivot-1")
    researcher.go("/pivots")
    researcher.go("/pivots/pivot-1")
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download").click()
    archive = folder / "pivot.tar"
    waiting.value.save_as(archive)
    with tarfile.open(archive) as found:
        assert "pivot-1/model.safetensors" in found.getnames()


def _cancel(site: Site, researcher: Tab) -> None:
    # The SDK's identity is demo-researcher; ada may not end its rounds, an operator may.
    round_id = site.submit("logits-unified", name="not-hers")
    researcher.go(f"/rounds/{round_id}")
    assert researcher.page.get_by_role("button", name="Cancel round").count() == 0
    site.operator.cancel(round_id)
    researcher.page.locator("h1 + .s-cancelled").wait_for()


def _revoke(site: Site, operator: Tab) -> None:
    name = site.plan.hospitals[0].name
    operator.go("/participants")
    form = operator.page.locator("form[action='/participants/revoke']")
    form.get_by_label("Name").fill(name)
    form.get_by_label("Why").fill("left the consortium")
    form.get_by_role("button").click()
    operator.page.locator(f"#p-{name} .s-offline").wait_for()
    operator.settled()


def _checked(tab: Tab) -> list[str]:
    from tests.integration.chromium import accessibility

    return accessibility(tab.page)
