"""Words of others on one harmless line, for logs and refusals. Imports nothing that costs time."""

import re
from typing import Final

MAX_TEXT: Final = 1000
"""Characters of one value; the rest is cut and counted."""
# Controls, and the characters that break or reorder a line on a terminal.
_UNSAFE: Final = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """`text` on one harmless line: control characters spelled out, at most MAX_TEXT characters."""
    cut = f"... ({len(text) - MAX_TEXT} more)" if len(text) > MAX_TEXT else ""
    return _UNSAFE.sub(_spelled, text[:MAX_TEXT]) + cut


def _spelled(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
