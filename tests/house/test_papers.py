"""What docs/papers.md names is there."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = [r for r in (ROOT / "docs/papers.md").read_text("utf-8").splitlines() if r.startswith("| ")]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_every_row_has_its_five_cells() -> None:
    assert len(ROWS) > 40
    assert [row for row in ROWS if len(cells(row)) != 5 or not all(cells(row))] == []


def test_every_function_named_is_there() -> None:
    missing = []
    for row in ROWS[1:]:
        module, found = Path(), 0
        for part in re.findall(r"`([^`]+)`", cells(row)[2]):
            path, _, name = part.rpartition(": ") if ": " in part else ("", "", part)
            if part.endswith(".py"):
                path, name = part, ""
            module, found = (ROOT / path if path else module), found + 1
            if not module.is_file() or (name and name not in _defined(module)):
                missing.append(part)
        if not found:
            missing.append(row)
    assert missing == []


def test_every_test_file_named_is_there() -> None:
    missing = []
    for row in ROWS[1:]:
        folder = ""
        for part in re.findall(r"`([^`]+)`", cells(row)[3]):
            folder = folder if "/" not in part else part.rpartition("/")[0]
            if not (ROOT / folder / part.rpartition("/")[2]).is_file():
                missing.append(part)
    assert missing == []


def _defined(module: Path) -> set[str]:
    nodes = ast.parse(module.read_text("utf-8")).body
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
