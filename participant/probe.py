"""Tries, from behind the wall of one of the participant's processes, what must not be possible.

`python -m participant.probe ROLE participant.toml`, attempts as JSON on stdin, outcomes as JSON on
stdout.
"""

import sys
from pathlib import Path

from participant.config import load_config
from participant.sandbox import ROLES, make_folders, wall_of
from trust.attempts import answer, asked
from trust.walls import enter


def main(argv: list[str]) -> int:
    """Go behind the wall, try everything, and tell."""
    role = next(role for role in ROLES if role == argv[0])
    config = load_config(Path(argv[1]))
    attempts = asked()
    make_folders(config)
    answer(enter(wall_of(role, config)), attempts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
