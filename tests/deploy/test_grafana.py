"""The board asks for figures that there are, by labels that they have, and asks for all of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.figures import Figures
from coordinator.metrics import LIVE
from coordinator.store import Store
from tests.own_python import python_with
from trust.ca import create_authority

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARD = json.loads((DEPLOY / "grafana" / "cofuse.json").read_text(encoding="utf-8"))
_ADDED = {"job", "le"}
"""Labels that the scraper adds, and that a histogram has by itself."""
_SYNTAX = """
import sys, promql_parser
for line in sys.stdin.read().splitlines():
    promql_parser.parse(line)
"""


def _expressions() -> list[str]:
    found = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    return [*found, *(row["expr"] for row in BOARD["annotations"]["list"])]


def _there(tmp_path: Path) -> dict[str, set[str]]:
    """The labels of each of our metrics, by its name."""
    create_authority(tmp_path / "ca", "test")
    ca = {"a": tmp_path / "ca" / "ca.pem"}
    figures = Figures(Store.at(tmp_path / "store.sqlite"), tmp_path, ca, dict)
    told: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(figures.text().decode()):
        name = family.name + "_total" * (family.type == "counter")
        told[name] = {label for sample in family.samples for label in sample.labels}
    for metric in (*LIVE, figures._contributions, figures._durations, figures._fusion):
        for family in metric.describe():
            name = family.name + "_total" * (family.type == "counter")
            told.setdefault(name, set()).update(metric._labelnames)
    for name in ("fed_node_last_seen_seconds", "fed_node_clock_skew_seconds"):
        told[name].add("node")
    return {name: labels for name, labels in told.items() if name.startswith("fed_")}


def test_every_figure_is_on_the_board_and_nothing_else_by_labels_that_it_has(
    tmp_path: Path,
) -> None:
    there, asked = _there(tmp_path), set()
    for expression in _expressions():
        (full,) = set(re.findall(r"fed_\w+", expression))
        name = re.sub(r"_(bucket|count|sum)$", "", full)
        assert name in there, expression
        asked.add(name)
        by = re.findall(r"by \(([^)]*)\)", expression)
        picked = re.findall(r"(\w+)(?:=|!=|=~|!~)\"", expression)
        labels = {label.strip() for group in by for label in group.split(",")} | {*picked}
        assert labels <= there[name] | _ADDED, expression
    assert asked == {name for name in there if not name.endswith("_created")}


def test_panels_do_not_overlap_and_each_has_a_unit() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["fieldConfig"]["defaults"]["unit"]
    ids = [panel["id"] for panel in BOARD["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.slow
def test_prometheus_own_grammar_reads_every_expression(tmp_path: Path) -> None:
    import subprocess

    import yaml

    rules: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    alerts = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    lines = [expression.replace("$job", "x") for expression in (*_expressions(), *alerts)]
    python = python_with(tmp_path / "promql", "promql-parser")
    words = [str(python), "-c", _SYNTAX]
    done = subprocess.run(
        words, input="\n".join(lines), text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
