"""What identifies a text: its runs of eight words. Shared by the tests that look for leaks."""

import re
from collections.abc import Iterable
from typing import Final

RUN_WORDS: Final = 8


def eight_word_runs(texts: Iterable[str]) -> set[str]:
    """Every run of eight words of each text, casefolded, words joined by one space.

    Runs do not cross texts. A text of fewer words is one run by itself, so none goes unwatched.
    """
    runs = set()
    for text in texts:
        words = re.findall(r"\w+", text.casefold())
        last = max(1, len(words) - RUN_WORDS + 1)
        runs |= {" ".join(words[at : at + RUN_WORDS]) for at in range(last)}
    return runs - {""}
