"""A real Chromium that reports whatever a page should not do."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
AXE = Path(__file__).parents[1] / "data" / "axe" / "axe.min.js"
PATIENCE_MS = 60_000
_FLAGS = (
    "--no-sandbox",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


@dataclass
class Tab:
    """One page of one person, and its sins."""

    page: Page
    origin: str
    context: BrowserContext
    sins: list[str] = field(default_factory=list)

    def go(self, address: str) -> None:
        """Open a page of the origin, and hold it to the rules once its plots are drawn."""
        self.page.goto(self.origin + address)
        self.settled()

    def settled(self) -> None:
        """Wait until the page's plots stand, then run axe over it."""
        self.page.wait_for_function(
            "[...document.querySelectorAll('figure[data-plot]')]"
            ".every(f => f.hidden || 'drawn' in f.dataset)"
        )
        self.sins += accessibility(self.page)

    def sign_in(self, name: str, password: str) -> None:
        """Through the form."""
        self.page.goto(f"{self.origin}/login")
        self.page.get_by_label("Name").fill(name)
        self.page.get_by_label("Password").fill(password)
        self.page.get_by_role("button", name="Sign in").click()
        self.page.get_by_role("button", name="Sign out").wait_for()

    def live(self) -> None:
        """Wait until the page follows the news."""
        self.page.locator(".live[data-on]").wait_for()


@contextmanager
def chromium() -> Iterator[Callable[..., Tab]]:
    """Start one; yields a function that opens a tab of its own context on an origin."""
    with sync_playwright() as playwright:
        browser: Browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(_FLAGS))
        yield lambda origin, **options: _tab(browser, origin, options)
        browser.close()


def accessibility(page: Page) -> list[str]:
    """What axe finds wrong with a page as it is now."""
    # Evaluated over the debugger, which the page's policy does not hold.
    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")["violations"]
    return [
        f"{page.url}: {one['id']}: {node['html'][:200]}" for one in found for node in one["nodes"]
    ]


def _tab(browser: Browser, origin: str, options: dict[str, Any]) -> Tab:
    context = browser.new_context(viewport={"width": 1280, "height": 860}, **options)
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    tab = Tab(page, origin, context)
    host = urlsplit(origin).netloc

    def asked(request: Any) -> None:
        if urlsplit(request.url).netloc != host:
            tab.sins.append(f"a request left the origin: {request.url}")

    def said(message: Any) -> None:
        if message.type in ("error", "warning"):  # a breach of the policy is an error too
            tab.sins.append(f"console: {message.text}")

    page.on("request", asked)
    page.on("console", said)
    page.on("pageerror", lambda error: tab.sins.append(f"script: {error}"))
    page.on("dialog", lambda dialog: dialog.accept())
    return tab
