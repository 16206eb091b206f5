"""Promises of every command: one envelope, one table of exit statuses, words instead of traces."""

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

from cofuse.cli import app
from cofuse.commands.connection import Json
from cofuse.failures import EXITS, LOCAL, OF_CLASS, failure_of
from cofuse.output import App, Command, answer, emit, fail, say, tell
from cofuse.reference_pages import PAGES, commands
from protos.errors import CATALOGUE, RemoteError
from protos.spec import SpecError

ROOT = Path(__file__).parents[2]
WORDS = {"RemoteError": "unreachable", "SpecError": "bad_spec"}


def one(body: Callable[[], None]) -> typer.Typer:
    made = App()
    made.command()(body)
    return made


def said(body: Callable[[], None], *words: str) -> tuple[int, dict[str, Any], str]:
    done = CliRunner().invoke(one(body), [*words, "--json"])
    return done.exit_code, json.loads(done.stdout.splitlines()[-1]), done.stderr


def test_every_command_takes_json_and_debug_and_says_what_it_does() -> None:
    found = list(commands(get_command(app)))
    assert len(found) > 50
    for path, command in found:
        names = {name for param in command.params for name in param.opts}
        assert {"--json", "--quiet", "--debug"} <= names, path
        assert isinstance(command, Command), path
        assert command.help, path


def test_no_command_writes_json_but_through_the_envelope() -> None:
    for path in (ROOT / "cofuse" / "commands").glob("*.py"):
        assert not re.search(r"typer\.echo\(\s*json\.dumps", path.read_text()), path.name


def test_data_goes_to_stdout_and_to_stderr_where_a_program_listens() -> None:
    def body() -> None:
        tell("for people")
        answer({"n": 1})

    plain = CliRunner().invoke(one(body), [])
    assert (plain.stdout, plain.stderr) == ("for people\n", "")
    done = CliRunner().invoke(one(body), ["--json"])
    assert (json.loads(done.stdout), done.stderr) == (
        {"schema": 1, "ok": True, "data": {"n": 1}},
        "for people\n",
    )


def test_quiet_mutes_all_but_data_and_errors() -> None:
    def body(bad: bool = False) -> None:
        tell("data")
        say("a remark")
        if bad:
            fail("no", 2)

    made = one(body)  # type: ignore[arg-type]
    quiet = CliRunner().invoke(made, ["--quiet"])
    assert (quiet.stdout, quiet.stderr) == ("data\n", "")
    assert CliRunner().invoke(made, []).stderr == "a remark\n"
    assert CliRunner().invoke(made, ["--quiet", "--json"]).stderr == ""
    assert CliRunner().invoke(made, ["--quiet", "--bad"]).stderr.startswith("error: no")


def test_no_command_talks_past_quiet() -> None:
    for path in (ROOT / "cofuse" / "commands").glob("*.py"):
        talk = re.findall(r"typer\.echo\([^\n]*err=True", path.read_text())
        assert not talk, f"{path.name}: {talk}; say it with cofuse.output.say"


def test_a_stream_gives_a_line_for_each_thing_and_the_envelope_last() -> None:
    def body(jsonl: Annotated[bool, typer.Option("--jsonl")] = False) -> None:
        emit({"n": 1})
        fail("no", 3)

    made = one(body)  # type: ignore[arg-type]
    lines = [json.loads(line) for line in CliRunner().invoke(made, ["--jsonl"]).stdout.splitlines()]
    assert lines[0] == {"n": 1}
    assert [line.get("ok") for line in lines] == [None, False]
    assert CliRunner().invoke(made, []).stdout == ""
    misused = CliRunner().invoke(made, ["--jsonl", "--none"]).stdout
    assert json.loads(misused)["error"]["code"] == "usage"


def test_a_command_without_an_answer_still_gives_the_envelope() -> None:
    assert said(lambda: None) == (0, {"schema": 1, "ok": True, "data": {}}, "")


def test_a_command_that_answers_by_itself_is_left_alone_and_fails_like_all() -> None:
    def body(as_json: Json = False, bad: bool = False) -> None:
        if bad:
            fail("no", 2)
        typer.echo(json.dumps({"own": as_json}))

    made = App()
    made.command()(body)
    assert CliRunner().invoke(made, ["--json"]).stdout == '{"own": true}\n'
    failed = CliRunner().invoke(made, ["--json", "--bad"])
    assert (failed.exit_code, json.loads(failed.stdout)["error"]["code"]) == (2, "usage")


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (SpecError("round.yaml:3: unknown key"), 2, "bad_spec"),
        (RemoteError("not_allowed", "no"), 4, "not_allowed"),
        (RemoteError("unreachable", "no"), 4, "unreachable"),
        (RemoteError("unknown_round", "no"), 2, "unknown_round"),
        (RemoteError("wrong_state", "no"), 1, "wrong_state"),
        (RemoteError("of-a-newer-coordinator", "no"), 1, "of-a-newer-coordinator"),
        (FileNotFoundError(2, "none", "x"), 2, "bad_file"),
        (KeyboardInterrupt(), 130, "stopped"),
        (ZeroDivisionError("by zero"), 1, "fault"),
    ],
)
def test_every_error_has_an_id_a_remedy_and_a_status_and_no_trace(
    error: BaseException, status: int, code: str
) -> None:
    def body() -> None:
        raise error

    found, envelope, words = said(body)
    assert (found, envelope["ok"], envelope["error"]["code"]) == (status, False, code)
    assert envelope["error"]["hint"]
    assert words.startswith("error: ")
    assert f"[{code}]" in words
    assert "Traceback" not in words


def test_debug_shows_where_it_came_from() -> None:
    def body() -> None:
        raise ZeroDivisionError

    done = CliRunner().invoke(one(body), ["--debug"])
    assert isinstance(done.exception, ZeroDivisionError)


def test_a_failure_may_carry_data() -> None:
    code, envelope, _ = said(lambda: fail("no", code="not_published", data={"n": 1}))
    assert (code, envelope["data"], envelope["ok"]) == (1, {"n": 1}, False)


@pytest.mark.parametrize("words", [["round", "show"], ["rond", "ls"], ["round", "shw", "rnd-1"]])
def test_misuse_is_told_to_programs_too(words: list[str]) -> None:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["code"] == "usage"
    assert done.stderr.count("Did you mean") == (words != ["round", "show"])


def test_every_error_there_is_has_its_class_its_page_and_a_known_status() -> None:
    page = (ROOT / "docs" / "errors.md").read_text()
    for code in {*LOCAL, *CATALOGUE, *OF_CLASS.values()}:
        assert f"\n## {code}\n" in page
        assert failure_of("", code=code).exit in EXITS
    defined = {
        name
        for path in ROOT.glob("[a-z]*/**/*.py")
        if path.parts[len(ROOT.parts)]
        in ("cofuse", "coordinator", "participant", "fp8", "protos", "trust")
        for name in re.findall(r"^class (\w+)\(", path.read_text(), re.MULTILINE)
    }
    assert OF_CLASS.keys() - {"OSError", "FileExistsError"} <= defined


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_that_is_drawn_from_code_is_fresh(name: str) -> None:
    assert (ROOT / "docs" / f"{name}.md").read_text() == PAGES[name](), "say: make docs"


def test_a_wrong_key_in_a_spec_is_told_with_its_line_before_anything_heavy(
    tmp_path: Path,
) -> None:
    """At most a second of CPU: what only a connection needs is not loaded."""
    (tmp_path / "round.yaml").write_text("name: one\npivot: pivot-0\nlosss: span_kl\n")
    code = (
        "import resource, sys\n"
        "from cofuse.cli import app\n"
        "try:\n"
        "    app(['round', 'check', 'round.yaml'])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 2\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "heavy = ('torch', 'flwr', 'transformers', 'structlog', 'numpy')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "print(used.ru_utime + used.ru_stime)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert "round.yaml:3: unknown key 'losss'; did you mean 'loss'?" in done.stderr
    heavy, used = done.stdout.splitlines()[-2:]
    assert heavy == "[]"
    assert float(used) < 1.0 * _slowness()


def test_help_is_there_at_once_and_loads_nothing_heavy() -> None:
    """At most half a second of CPU, and none of the libraries that cost one."""
    code = (
        "import resource, sys\n"
        "from cofuse.cli import app\n"
        "def show(*words):\n"
        "    try:\n"
        "        app([*words, '--help'])\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0\n"
        "show()\n"
        "used = resource.getrusage(resource.RUSAGE_SELF)\n"
        "for words in (['round'], ['round', 'submit'], ['fuse'], ['demo']): show(*words)\n"
        "heavy = ('torch', 'flwr', 'transformers', 'grpc', 'pydantic', 'numpy', 'datasets')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "print(used.ru_utime + used.ru_stime)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    ).stdout.splitlines()
    assert shown[-2] == "[]"
    assert float(shown[-1]) < 0.5 * _slowness()


def _slowness() -> float:
    """How much slower this machine runs Python than the promise was made for, at least 1."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    sum(number * number for number in range(1_000_000))
    return max(1.0, (resource.getrusage(resource.RUSAGE_SELF).ru_utime - before) / 0.1)


def test_the_shell_completes_commands() -> None:
    typed = {
        "_COFUSE_COMPLETE": "complete_bash",
        "COMP_WORDS": "cofuse round ev",
        "COMP_CWORD": "2",
    }
    done = CliRunner().invoke(app, [], prog_name="cofuse", env=typed)
    assert done.stdout.split() == ["evals"]


def test_no_color_means_no_escape() -> None:
    done = CliRunner().invoke(app, ["fp8", "--help"], env={"NO_COLOR": "1"}, color=True)
    assert "\x1b" not in done.stdout
