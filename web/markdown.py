"""Markdown of a model card as a part of a page: tables and text, nothing that fetches or runs."""

import itertools
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

_FRONT: Final = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


_OPENS: Final = '<div class="scroll" role="group" tabindex="0" aria-label="Table {}"><table>'
"""A wide table scrolls in itself, by keyboard too, and never the page."""


@lru_cache(64)
def markdown(text: str) -> Markup:
    """HTML of Markdown from whomever: tags in it are shown as text, pictures are left out."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = reader.parse(_FRONT.sub("", text, count=1))
    _make_fit(tokens)
    html = reader.renderer.render(tokens, reader.options, {})
    numbers = itertools.count(1)
    html = re.sub("<table>", lambda _: _OPENS.format(next(numbers)), html)
    html = html.replace("</table>", "</table></div>")
    return Markup(html)  # noqa: S704 - made of escaped text, see above


def _make_fit(tokens: Sequence[Token]) -> None:
    """What the page's policy and its readers need of Markdown's own HTML."""
    for at, token in enumerate(tokens):
        if token.attrs.pop("style", None):  # the alignment of a cell: no styles in attributes
            token.attrs["class"] = "number"
        if token.type == "fence":
            token.attrs["tabindex"] = "0"  # it scrolls, so the keyboard must reach it
        if token.type == "th_open" and not tokens[at + 1].content:
            token.tag = tokens[at + 2].tag = "td"  # nothing is no heading
