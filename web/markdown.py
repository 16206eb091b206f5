"""Markdown of a model card as a part of a page: tables and text, nothing that fetches or runs."""

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markupsafe import Markup

_FRONT: Final = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


@lru_cache(64)
def markdown(text: str) -> Markup:
    """HTML of Markdown from whomever: tags in it are shown as text, pictures are left out."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    tokens = reader.parse(_FRONT.sub("", text, count=1))
    _without_styles(tokens)
    html = reader.renderer.render(tokens, reader.options, {})
    return Markup(html)  # noqa: S704 - made of escaped text, see above


def _without_styles(tokens: Iterable[Token]) -> None:
    """Say the alignment of cells by a class: the page's policy forbids styles in attributes."""
    for token in tokens:
        if token.attrs.pop("style", None):
            token.attrs["class"] = "number"
        if token.tag == "pre" or token.type == "fence":
            token.attrs["tabindex"] = "0"  # it scrolls, so the keyboard must reach it
