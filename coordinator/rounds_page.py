"""docs/rounds.md, drawn from the table: `python -m coordinator.rounds_page`."""

from coordinator.rounds import FINAL, OWNERS, TRANSITIONS


def as_markdown() -> str:
    """The table, its diagram, and who owns each state, as docs/rounds.md shows them."""
    arrows = "\n".join(f"    {s} --> {t}: {e}" for (s, e), t in TRANSITIONS.items())
    rows = "\n".join(f"| {s} | {e} | {t} |" for (s, e), t in TRANSITIONS.items())
    owners = "\n".join(f"| {state} | {who} | {end} |" for state, (who, end) in OWNERS.items())
    return (
        "# Rounds\n\nDrawn from `coordinator/rounds.py` by `make docs`; "
        "a test fails when this page differs.\n\n"
        f"```mermaid\nstateDiagram-v2\n    [*] --> SUBMITTED\n{arrows}\n```\n\n"
        f"| state | event | next state |\n|---|---|---|\n{rows}\n\n"
        f"Final: {', '.join(sorted(FINAL))}.\n\n"
        "Every other state has an owner, and an end to waiting for it:\n\n"
        f"| state | who acts | until |\n|---|---|---|\n{owners}\n"
    )


if __name__ == "__main__":
    import sys

    sys.stdout.write(as_markdown())
