"""The command line as a user calls it, in this process: an interpreter of its own takes seconds."""

from typer.testing import CliRunner

from cofuse.cli import app


def run(*words: object) -> tuple[int, str, str]:
    """Exit status, stdout, stderr."""
    done = CliRunner().invoke(app, [*map(str, words)])
    return done.exit_code, done.stdout, done.stderr
