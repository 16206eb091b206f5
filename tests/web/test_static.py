"""What is served beside the pages: known files, and none that asks anybody else."""

import hashlib
import json
import re
from pathlib import Path

import web.pages

STATIC = Path(web.pages.__file__).parent / "static"
VENDOR = STATIC / "vendor"
TEMPLATES = [
    path
    for folder in ("web/templates", "coordinator/console/templates", "participant/page/templates")
    for path in sorted((STATIC.parents[1] / folder).glob("*.html"))
]


def test_vendored_files_are_those_of_the_manifest_and_each_has_its_licence() -> None:
    sums = dict(
        reversed(line.split("  ")) for line in (VENDOR / "SHA256SUMS").read_text().splitlines()
    )
    found = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in VENDOR.iterdir()
        if path.name not in ("SHA256SUMS", "package.json")
    }
    assert found == sums
    scripts = {name.partition(".")[0] for name in found if name.endswith(".js")}
    assert {name.partition(".")[0] for name in found if name.endswith(".LICENSE")} == scripts
    versions = json.loads((VENDOR / "package.json").read_text())["dependencies"]
    for package, version in versions.items():
        script = (VENDOR / f"{package.partition('.')[0]}.min.js").read_text(encoding="utf-8")
        assert f'"{version}"' in script, package


def test_no_page_has_anything_inline_or_from_elsewhere() -> None:
    assert len(TEMPLATES) > 12
    for path in TEMPLATES:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:", text), path
        assert not re.search(r"<script(?![^>]*\ssrc=)", text), path
        assert not re.search(r"(src|href|action)=\"(https?:)?//", text), path


def test_our_own_scripts_and_styles_name_no_address() -> None:
    for name in ("live.js", "charts.js", "site.css"):
        assert not re.search(r"https?://|//cdn|@import|url\(", (STATIC / name).read_text()), name


def test_every_form_that_posts_carries_its_token() -> None:
    for path in TEMPLATES:
        text = path.read_text(encoding="utf-8")
        for form in re.findall(r"<form[^>]*method=\"post\".*?</form>", text, re.DOTALL):
            assert "csrf(" in form or path.name == "login.html", path
