"""A card may say anything, and do nothing."""

import re

from hypothesis import given
from hypothesis import strategies as st

from web.markdown import markdown

PIECES = st.sampled_from(
    [
        "<script>x</script>",
        "<img src=//e>",
        "[a](javascript:x)",
        "![p](http://e/p.png)",
        "<b onclick=x>",
        "[l](https://e)",
        *("| a |\n", "|--:|\n", "```\n", "`", "**", "\n", "# ", "&", '"', "word"),
    ]
)


@given(st.lists(PIECES, max_size=12).map("".join))
def test_nothing_of_a_card_runs_fetches_or_styles(text: str) -> None:
    html = str(markdown(text))
    tags = re.findall(r"<[^>]*>", html)
    assert not any(re.search(r"<(script|img|b)\b|\sstyle=|\son\w+=|javascript:", t) for t in tags)


def test_tables_stay_tables_and_front_matter_goes() -> None:
    html = str(markdown("---\nlicense: x\n---\n# t\n\n| a | b |\n|---|--:|\n| c | 1 |\n"))
    assert "license" not in html
    assert '<div class="scroll" role="group" tabindex="0" aria-label="Table 1"><table>' in html
    assert html.count("<div") == html.count("</div>") == 1
    assert '<td class="number">1</td>' in html


def test_an_empty_cell_is_no_heading() -> None:
    html = str(markdown("| | b |\n|---|---|\n| c | 1 |\n"))
    assert "<th></th>" not in html
    assert "<th>b</th>" in html
