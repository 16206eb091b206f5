"""docs/errors.md and docs/cli.md, drawn from the tables and commands themselves.

python -m cofuse.reference_pages errors|cli
"""

import sys
from collections.abc import Iterator
from typing import Any

import click

from cofuse.failures import EXITS, LOCAL, failure_of
from protos.errors import CATALOGUE


def errors_page() -> str:
    """Every error id: where it comes from, the exit status, and what to do."""
    lines = [
        "# Errors",
        "",
        "Every error has an id, which `--json` gives as `error.code`, and a remedy. This page is",
        "drawn from `cofuse/failures.py` and `protos/errors.py` by `make docs`.",
        "",
        "| exit status | of `cofuse` |",
        "|---|---|",
        *(f"| {status} | {means} |" for status, means in EXITS.items()),
    ]
    for code in sorted({*LOCAL, *CATALOGUE}):
        exit_status = failure_of("", code=code).exit
        origin = (
            f"from the other side, gRPC {CATALOGUE[code].status.name}"
            if code in CATALOGUE
            else "of the command line"
        )
        remedy = (LOCAL.get(code) or CATALOGUE[code]).do
        remedy = remedy[0].upper() + remedy[1:]
        lines += [
            "",
            f"## {code}",
            "",
            f"Exit status {exit_status}, {origin}.",
            "",
            _end(remedy),
        ]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """Every command with its arguments and options."""
    from typer.main import get_command

    from cofuse.cli import app

    lines = [
        "# Commands",
        "",
        "Drawn from the commands themselves by `make docs`. Each also takes `--json` (one envelope",
        "as the last line of stdout, [errors.md](errors.md)), `--debug` (where an error came from)",
        "and `--help`. Data goes to stdout, talk to stderr. `cofuse --install-completion` teaches",
        "your shell the names; `NO_COLOR=1` keeps everything plain.",
    ]
    for path, command in commands(get_command(app)):
        usage = " ".join(
            (param.human_readable_name.upper() if param.required else f"[{param.name}]".upper())
            for param in command.params
            if isinstance(param, click.Argument)
        )
        lines += ["", f"## {path}", "", "```", f"{path} {usage}".rstrip(), "```", ""]
        lines += [_end(command.help or "")]
        rows = list(_rows(command))
        if rows:
            lines += ["", "| | |", "|---|---|", *rows]
    return "\n".join(lines) + "\n"


def commands(root: Any, path: str = "cofuse") -> Iterator[tuple[str, Any]]:
    """Every command that does something, with how it is typed."""
    for name, command in root.commands.items():
        typed = f"{path} {name}"
        if hasattr(command, "commands"):
            yield from commands(command, typed)
        else:
            yield typed, command


def _rows(command: Any) -> Iterator[str]:
    for param in command.params:
        if {"--json", "--debug"} & set(param.opts):
            continue
        if isinstance(param, click.Argument):
            name = param.human_readable_name.upper()
        else:
            name = ", ".join([*param.opts, *param.secondary_opts])
        words = (getattr(param, "help", "") or "").replace("|", "\\|").replace("\n", " ")
        yield f"| `{name}` | {words} |"


def _end(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


PAGES = {"errors": errors_page, "cli": cli_page}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PAGES:
        sys.exit(f"usage: python -m cofuse.reference_pages {'|'.join(PAGES)}")
    sys.stdout.write(PAGES[sys.argv[1]]())
