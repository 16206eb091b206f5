"""How a command speaks: data on stdout, talk on stderr, and one envelope where --json asks for it.

{"schema": 1, "ok": true, "data": {...}} or {"schema": 1, "ok": false, "error": {...}} is the last
line of stdout. A command says `tell` for people and `answer` for programs, `say`s on stderr what is
no data, and ends with `fail`. `--quiet` mutes what is said; errors stay. A stream takes `--jsonl`:
one JSON object a line as it happens (`emit`), and the envelope at the end.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NoReturn, TypeVar

import click
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from typer.utils import get_params_from_function

from cofuse.failures import failure_of

SCHEMA: Final = 1
_JSON, _LINES, _QUIET = "cofuse.json", "cofuse.jsonl", "cofuse.quiet"
_DEBUG, _ANSWERED = "cofuse.debug", "cofuse.answered"
_PROGRAM: Final = ("--json", "--jsonl")
"""Options by which a program says that it listens."""
_Callback = TypeVar("_Callback", bound=Callable[..., Any])


def wants_json() -> bool:
    """Whether a program listens."""
    return bool(_meta().get(_JSON) or wants_lines())


def wants_lines() -> bool:
    """Whether a program listens to a stream as it happens."""
    return bool(_meta().get(_LINES))


def is_quiet() -> bool:
    """Whether nothing is to be said but data and errors."""
    return bool(_meta().get(_QUIET))


def wants_debug() -> bool:
    """Whether an error is to show where it came from."""
    return bool(_meta().get(_DEBUG) or os.environ.get("COFUSE_DEBUG"))


def tell(text: object = "") -> None:
    """Say data for people: on stdout, which --json keeps for programs."""
    if not wants_json():
        typer.echo(text)
    else:
        say(text)


def say(text: object) -> None:
    """Say what is no data: progress, remarks, the next step. On stderr, unless --quiet."""
    if not is_quiet():
        typer.echo(text, err=True)


def emit(line: Mapping[str, Any]) -> None:
    """Give one line of a stream to a program that listens with --jsonl; nothing without."""
    if wants_lines():
        typer.echo(json.dumps(line))


def answer(data: Mapping[str, Any], *, bare: bool = False) -> None:
    """Give the result to a program; nothing without --json.

    Args: bare: the keys stand beside `schema`, not inside `data` (`cofuse demo`).
    """
    inside = data if bare else {"ok": True, "data": data}
    _write({"schema": SCHEMA, **inside})


def fail(
    error: object,
    status: int | None = None,
    *,
    code: str = "",
    data: Mapping[str, Any] | None = None,
) -> NoReturn:
    """Say the error and its remedy, and end with its exit status.

    Args: status: default: what cofuse/failures.py says. code: id of an error that is only words.
        data: what a program gets nevertheless.
    """
    found = failure_of(error, code=code, status=status)
    typer.echo(f"error: {found.message} [{found.code}]", err=True)
    if found.hint.lower() not in found.message.lower():
        typer.echo(f"    -> {found.hint}", err=True)
    more = {} if data is None else {"data": data}
    _write({"schema": SCHEMA, "ok": False, **more, "error": found.as_json()})
    raise typer.Exit(found.exit)


class Command(TyperCommand):
    """A command with --json, --quiet and --debug, whose errors are words."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._restore_argument_help()
        names = {name for param in self.params for name in param.opts}
        self._answers_itself = "--json" in names
        lines = next((param for param in self.params if "--jsonl" in param.opts), None)
        if lines is not None:
            lines.callback = _noting(_LINES, lines.callback)
        for name, key, says in (
            ("--json", _JSON, "One JSON object as the last line of stdout."),
            ("--quiet", _QUIET, "Say nothing but data and errors."),
            ("--debug", _DEBUG, "Show where an error came from."),
        ):
            if name in names:
                option = next(param for param in self.params if name in param.opts)
                option.callback = _noting(key, option.callback)
            else:
                self.params.append(
                    TyperOption(
                        param_decls=[name],
                        is_flag=True,
                        expose_value=False,
                        callback=_noting(key, None),
                        help=says,
                        default=False,
                    )
                )

    def _restore_argument_help(self) -> None:
        """Give arguments their help again: click 8.3 clears what typer 0.20 has set."""
        function = getattr(self.callback, "__wrapped__", None)
        said = get_params_from_function(function) if function else {}
        for param in self.params:
            if isinstance(param, TyperArgument) and param.name in said:
                param.help = getattr(said[param.name].default, "help", None)

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Leave them to typer, which says whether they are required."""

    def get_help(self, ctx: click.Context) -> str:
        """As click's, without the backslashes that typer puts there for rich."""
        return super().get_help(ctx).replace("\\[", "[")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click's."""
        with _misuse(ctx, args):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run it; every error becomes words, and every --json an envelope."""
        try:
            result = super().invoke(ctx)
        except click.exceptions.Exit as end:
            if end.exit_code == 0:
                self._close(ctx)
            raise
        except click.ClickException:
            raise
        except (KeyboardInterrupt, click.Abort):
            fail("stopped", code="stopped")
        except Exception as error:
            if wants_debug():
                raise
            fail(error)
        self._close(ctx)
        return result

    def _close(self, ctx: click.Context) -> None:
        if not self._answers_itself and not ctx.meta.get(_ANSWERED):
            answer({})


class Group(TyperGroup):
    """A group that tells a program, too, when there is no such command."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's."""
        with _misuse(ctx, args):
            return super().resolve_command(ctx, args)


class App(typer.Typer):
    """A Typer whose commands, and those of the apps added to it, are `Command`s."""

    def __init__(self, **settings: Any) -> None:
        """As Typer's; click itself suggests the command that was meant."""
        super().__init__(**{"cls": Group, "suggest_commands": False, **settings})

    def command(
        self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **settings: Any
    ) -> Callable[[_Callback], _Callback]:
        """As Typer's."""
        return super().command(name, cls=cls or Command, **settings)

    def add_typer(self, typer_instance: typer.Typer, **settings: Any) -> None:
        """As Typer's; plain commands become ours."""
        for info in typer_instance.registered_commands:
            info.cls = info.cls or Command
        super().add_typer(typer_instance, **settings)


def csv_text(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table as CSV, without the last line's end."""
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


@contextlib.contextmanager
def _misuse(ctx: click.Context, args: Sequence[str]) -> Iterator[None]:
    """What cannot be parsed is told to a program that asked for JSON, too."""
    asked = any(option in args for option in _PROGRAM)
    try:
        yield
    except click.UsageError as error:
        if asked:
            ctx.meta[_JSON] = True
            told = failure_of(error.format_message(), code="usage").as_json()
            _write({"schema": SCHEMA, "ok": False, "error": told}, ctx)
        raise


def _noting(key: str, before: Callable[..., Any] | None) -> Callable[..., Any]:
    """An option's callback that remembers the flag for the whole command."""

    def note(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        value = before(ctx, param, value) if before else value
        ctx.meta[key] = bool(value)
        return value

    return note


def _meta() -> dict[str, Any]:
    context = click.get_current_context(silent=True)
    return {} if context is None else context.meta


def _write(envelope: Mapping[str, Any], ctx: click.Context | None = None) -> None:
    meta = _meta() if ctx is None else ctx.meta
    if (meta.get(_JSON) or meta.get(_LINES)) and not meta.get(_ANSWERED):
        meta[_ANSWERED] = True
        typer.echo(json.dumps(envelope))
