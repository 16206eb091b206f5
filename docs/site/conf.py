"""Sphinx over the Markdown in docs/: furo's theme, GitHub's anchors, nothing fetched."""

project = "cofuse"
author = "The cofuse maintainers"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "site/index"
exclude_patterns = ["site/requirements.txt"]
html_theme = "furo"
html_title = "cofuse"
html_copy_source = False
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]
# Links that leave docs/ (../examples, ../README.md) are good on the repository's pages, not here.
suppress_warnings = ["myst.xref_missing", "misc.highlighting_failure"]
