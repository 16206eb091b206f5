"""Tries, from behind the wall of a process that holds a key, what must not be possible.

`python -m coordinator.probe ROLE coordinator.toml`, attempts as JSON on stdin, outcomes as JSON on
stdout.
"""

import sys
from pathlib import Path

from coordinator.config import load_config
from coordinator.walls import wall_of
from trust.attempts import answer, asked
from trust.walls import enter


def main(argv: list[str]) -> int:
    """Go behind the wall, try everything, and tell."""
    config = load_config(Path(argv[1]))
    attempts = asked()
    answer(enter(wall_of(argv[0], config)), attempts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
