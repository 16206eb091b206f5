"""Every test that docs/trust.md names is there, and every attack of its list has one."""

import re
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs" / "trust.md").read_text(encoding="utf-8")
ATTACKS: Final = {f"T{number}" for number in (*range(12, 15), *range(18, 34), 35, 36)}


def test_each_attack_has_a_line() -> None:
    found = re.findall(r"^\| (T\d+) \|", PAGE, re.MULTILINE)
    assert sorted(found) == sorted(ATTACKS)


def test_each_named_test_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    missing = [
        f"{path}::{test}"
        for path, test in named
        if not (ROOT / path).is_file() or f"def {test}" not in (ROOT / path).read_text("utf-8")
    ]
    assert len(named) > 50
    assert not missing
