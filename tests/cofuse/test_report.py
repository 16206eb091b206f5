"""Laws of the report: it says every number, escapes every name, and fetches nothing."""

import dataclasses
import math
from collections.abc import Mapping
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cofuse import charts
from cofuse.report import Participant, ReportData, render_report
from cofuse.report_charts import means_of, ordered_models

DOMAINS = ("cardiology", "neurology", "oncology")
MODELS = (
    *("base", "sft", "infifusion", "unified", "pairwise", "weights"),
    *("expert:alpha", "expert:beta", "expert:gamma"),
)
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</svg></figure><iframe>",
    "--><b>",
    "' onload='alert(1)",
    r"$\frac{1}{$ \unknown{",
    "{{ 7 * 7 }}{% raw %}",
    "_hidden",
)


class Page(HTMLParser):
    """What a browser would see: tags, attributes, text, and the cells of the tables."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.open_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.open_cell = True
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.open_cell = False

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if self.open_cell:
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return "".join(self.words)


def _scores(low: float, step: float) -> Mapping[str, Mapping[str, float]]:
    """A number for each model and domain, all different."""
    return {
        model: {domain: low + step * (3 * row + column) for column, domain in enumerate(DOMAINS)}
        for row, model in enumerate(MODELS)
    }


def _result(names: tuple[str, str, str] = ("alpha", "beta", "gamma")) -> ReportData:
    participants = [
        Participant(
            name=name, department=domain, architecture=name, parameters=1_234_567 + at,
            vocabulary=2_048 + at,
        )
        for at, (name, domain) in enumerate(zip(names, DOMAINS, strict=True))
    ]  # fmt: skip
    return ReportData(
        title=f"A run of {names[0]}",
        created="2026-01-02T03:04:05Z",
        seconds=187.6,
        ok=False,
        claims=[("unified beats base", True), (f"unified beats {names[0]}", False)],
        bpb=_scores(1.211, 0.0371),
        accuracy=_scores(0.203, 0.0217),
        curves={
            "expert:" + names[0]: [5.125, 3.25, 2.0625],
            "pairwise:" + names[1]: [4.5, math.nan, 1.75],
            "unified": [6.75 - step / 100 for step in range(400)],
            names[2]: [3.875],
        },
        bytes_left={name: 12_345_678 + at for at, name in enumerate(names)},
        peak_rss_mb=4321.4,
        pivots={"unified": f"/out/{names[0]}/unified", "weights": "/out/weights"},
        participants=participants,
        attribution="Mondo, CC BY 4.0, https://creativecommons.org/licenses/by/4.0/",
        parents={"weights": "unified"},
    )


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render_report(_result()))


def _rows_with(page: Page, *head: str) -> list[dict[str, list[str]]]:
    """The tables with this heading, each as heading of the row to the other cells."""
    return [
        {row[0]: row[1:] for row in table[1:]} for table in page.tables if tuple(table[0]) == head
    ]


def test_every_score_is_in_its_cell_with_its_mean(page: Page) -> None:
    result = _result()
    heat, bits, accuracy = _rows_with(page, "model", *DOMAINS, "mean")
    for model in MODELS:
        numbers = [*result.bpb[model].values(), means_of(result.bpb)[model]]
        assert heat[model] == bits[model] == [f"{x:.3f}" for x in numbers]
        shares = [*result.accuracy[model].values(), means_of(result.accuracy)[model]]
        assert accuracy[model] == [f"{x:.1%}" for x in shares]


def test_every_bit_per_byte_stands_in_the_drawing_too(page: Page) -> None:
    drawn = Page(charts.heatmap("h", [MODELS], DOMAINS, _cells()))
    for scores in _result().bpb.values():
        assert all(f"{x:.3f}" in drawn.text for x in scores.values())
    assert page.text.count(f"{_result().bpb['sft']['oncology']:.3f}") == 3


def _cells() -> dict[str, list[float]]:
    return {model: list(scores.values()) for model, scores in _result().bpb.items()}


def test_participants_bytes_and_curves_are_in_their_tables(page: Page) -> None:
    (who,) = _rows_with(
        page, "participant", "department", "architecture", "parameters", "vocabulary"
    )
    assert who["beta"] == ["neurology", "beta", "1,234,568", "2,049"]
    (left,) = _rows_with(page, "participant", "bytes", "in words")
    assert left == {
        "alpha": ["12,345,678", "12.3 MB"],
        "beta": ["12,345,679", "12.3 MB"],
        "gamma": ["12,345,680", "12.3 MB"],
    }
    runs: dict[str, list[str]] = {}
    for table in _rows_with(page, "run", "steps", "first loss", "lowest loss", "last loss"):
        runs |= table
    assert runs["expert:alpha"] == ["3", "5.125", "2.062", "2.062"]
    assert runs["pairwise:beta"] == ["3", "4.5", "1.75", "1.75"]
    assert runs["unified"] == ["400", "6.75", "2.76", "2.76"]
    assert runs["gamma"] == ["1", "3.875", "3.875", "3.875"]


def test_the_header_says_what_ran_and_what_does_not_hold(page: Page) -> None:
    text = " ".join(page.text.split())
    for words in (
        "A run of alpha", "2026-01-02T03:04:05Z", "3 min 08 s", "4,321 MB", "37 MB",
        "Not everything claimed holds", "unified beats base holds",
        "unified beats alpha does not hold", "/out/alpha/unified", "/out/weights",
        "https://creativecommons.org/licenses/by/4.0/",
    ):  # fmt: skip
        assert words in text
    held = Page(render_report(dataclasses.replace(_result(), ok=True)))
    assert "Everything claimed holds" in " ".join(held.text.split())


def test_the_best_model_has_the_fewest_bits_and_the_most_right_answers(page: Page) -> None:
    labels = [value for _, name, value in page.attributes if name == "aria-label"]
    best = [label for label in labels if "Best: " in label]
    assert len(best) == 2
    assert "Best: base, 1.248." in best[0]
    assert "Best: expert:gamma, 74.6%." in best[1]


def test_every_plot_has_its_table_beneath(page: Page) -> None:
    figures = [name for tag, _, name in page.attributes if tag == "figure" and name == "img"]
    tables = len(page.tables) - 1  # less the participants
    assert len(figures) == tables == 7
    assert {"svg", "details", "summary", "main", "h1"} <= page.tags


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_text_and_nothing_else(page: Page, name: str) -> None:
    attacked = Page(render_report(_result((name, name + "2", name + "3"))))
    assert attacked.tags == page.tags
    assert {a[:2] for a in attacked.attributes} == {a[:2] for a in page.attributes}
    assert name in attacked.text
    assert not attacked.tags & {"script", "img", "iframe", "b"}


def test_a_hostile_name_of_a_model_or_domain_is_text_and_nothing_else(page: Page) -> None:
    scores = {name: {other: 1.5 for other in HOSTILE} for name in HOSTILE}
    result = dataclasses.replace(_result(), bpb=scores, accuracy=scores)
    attacked = Page(render_report(result))
    assert attacked.tags <= page.tags
    assert all(name in attacked.text for name in HOSTILE)


def test_the_page_fetches_nothing_and_runs_nothing(page: Page) -> None:
    text = render_report(_result(HOSTILE[:3]))
    for tag, name, value in (*page.attributes, *Page(text).attributes):
        assert not name.startswith("on"), (tag, name)
        if name in ("href", "xlink:href", "src", "srcset", "data", "action", "poster"):
            assert value.startswith("#"), (tag, name, value)
        if name == "style":
            assert "url(" not in value.replace("url(#", "")
        if value.startswith("http") and name != "xmlns":
            assert name == "xmlns:xlink", (tag, name, value)
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "base", "img"}
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_the_drawings_follow_the_theme_and_share_no_id(page: Page) -> None:
    text = render_report(_result())
    assert not any(color in text for color in charts.STAND_IN.values())
    for name in charts.VARIABLES:
        assert text.count(f"--{name}: ") >= 2, f"{name} has no dark colour"
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = [value for _, name, value in page.attributes if name in ("href", "aria-labelledby")]
    assert {value.removeprefix("#") for value in used} <= set(ids)


def test_a_page_depends_on_its_numbers_alone() -> None:
    assert render_report(_result()) == render_report(_result())


def test_a_missing_number_is_said_and_an_empty_run_still_has_a_page() -> None:
    result = dataclasses.replace(_result(), bpb={"base": {"a": 1.5, "b": math.nan}, "sft": {}})
    rows = _rows_with(Page(render_report(result)), "model", "a", "b", "mean")[0]
    assert rows == {"base": ["1.500", "none", "none"], "sft": ["none", "none", "none"]}
    nothing = dataclasses.replace(
        result, bpb={}, accuracy={}, curves={"unified": []}, bytes_left={}, pivots={}, claims=[],
        participants=[],
    )  # fmt: skip
    assert "Not everything claimed holds" in " ".join(Page(render_report(nothing)).text.split())


def test_pivots_come_first_and_experts_last_in_the_order_given() -> None:
    shuffled = ["expert:z", "uniform", "sft", "weights", "expert:a", "base", "unified"]
    assert ordered_models(shuffled) == [
        ["unified", "weights"],
        ["base", "sft", "uniform"],
        ["expert:z", "expert:a"],
    ]


def test_a_model_that_lacks_a_domain_has_no_mean() -> None:
    means = means_of({"base": {"a": 1.0, "b": 2.0}, "sft": {"a": 1.0}})
    assert means["base"] == 1.5
    assert math.isnan(means["sft"])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_a_lower_number_never_has_a_weaker_colour(numbers: list[float]) -> None:
    steps = [charts.heat_step(value, numbers) for value in sorted(numbers)]
    assert steps == sorted(steps)
    assert steps[0] == 0
    assert steps[-1] == (charts.HEAT_STEPS - 1 if max(numbers) > min(numbers) else 0)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=2_000))
def test_a_drawn_curve_is_short_and_stays_between_the_losses(losses: list[float]) -> None:
    steps, means = charts._thinned(losses)
    assert len(steps) == len(means) <= charts.CURVE_POINTS
    assert 0 <= steps[0] <= steps[-1] <= len(losses) - 1
    assert min(losses) - 1e-9 <= min(means) <= max(means) <= max(losses) + 1e-9


@given(st.integers(0, 10**14))
def test_a_size_in_words_is_the_size_within_half_a_digit(count: int) -> None:
    number, unit = charts.bytes_in_words(count).split()
    scale = 1000 ** ["B", "kB", "MB", "GB", "TB"].index(unit)
    assert float(number) * scale == pytest.approx(count, rel=0.0051)
    assert float(number) < 1000
