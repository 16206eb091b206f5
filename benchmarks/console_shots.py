"""Pictures of every page for docs/console.md, from a small federation that really runs.

    python benchmarks/console_shots.py [--out docs/console]

Some minutes. Needs a chromium on the PATH.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# Run as a script, this file's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.integration.chromium import Tab, chromium
from tests.integration.console_site import (
    LIFELIKE,
    OPERATOR,
    PASSWORD,
    PATIENCE_S,
    Site,
    console_site,
    wait_for,
)

ROOT = Path(__file__).resolve().parents[1]


def shoot(tab: Tab, address: str, path: Path) -> None:
    """Open a page, and take all of it."""
    tab.go(address)
    tab.page.wait_for_function("document.fonts.status === 'loaded'")
    tab.page.evaluate("document.getAnimations().forEach(one => one.finish())")
    tab.page.screenshot(path=path, full_page=True, animations="disabled")
    print(path)


def rounds(site: Site) -> str:
    """Three finished rounds, one cancelled, one that waits, one at work; return the last."""
    site.run("logits-unified", purpose="trial")
    site.run("logits-pairwise", purpose="trial", pivot="pivot-1")
    site.run("weights", purpose="trial", pivot="pivot-2")
    site.operator.cancel(site.submit("logits-unified", name="second-thoughts"))
    asked = site.submit("logits-unified", name="asks-first", pivot="pivot-3")
    site.operator.approve(asked)
    site.submit("logits-unified", name="not-approved-yet", pivot="pivot-3")
    return asked


def participant(site: Site, asked: str, out: Path, open_tab: Callable[[str], Tab]) -> None:
    """The third institution's own page, while a release waits there."""
    home = site.folder / site.plan.hospitals[2].name
    waiting = home / "data" / "approvals"
    wait_for(lambda: any(waiting.glob(f"{asked}-*.release.json")), site.federation)
    words = [sys.executable, "-m", "cofuse.cli", "participant", "page", str(home), "--by", "carol"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        url, _, key = process.stdout.readline().strip().rpartition("/")
        tab = open_tab(url)
        tab.page.goto(f"{url}/{key}")
        shoot(tab, "/", out / "participant.png")
        tab.page.get_by_role("link", name="Look and decide").click()
        shoot(tab, tab.page.url.removeprefix(url), out / "release.png")
        tab.page.get_by_role("button", name="Approve").click()
        tab.page.get_by_text("Nothing waits.").wait_for()
        process.terminate()


def main() -> int:
    """Make them all."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "console")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        console_site(Path(folder), LIFELIKE) as site,
        chromium() as open_tab,
    ):
        asked = rounds(site)
        tab = open_tab(site.url)
        tab.sign_in(OPERATOR, PASSWORD)
        participant(site, asked, out, open_tab)
        tab.go(f"/rounds/{asked}")
        tab.page.locator("#t-loss tbody tr").nth(2).wait_for(timeout=PATIENCE_S * 1000)
        shoot(tab, f"/rounds/{asked}", out / "round.png")
        for address, name in (
            ("/", "rounds"),
            ("/evals?pivot=pivot-1", "evals"),
            ("/pivots", "pivots"),
            ("/participants", "participants"),
            ("/audit", "audit"),
        ):
            shoot(tab, address, out / f"{name}.png")
    for sin in tab.sins:
        print(sin, file=sys.stderr)
    return 1 if tab.sins else 0


if __name__ == "__main__":
    raise SystemExit(main())
