"""Strict TOML for both programs: unknown keys are errors, relative paths start at the file."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from protos.faults import in_words
from protos.tls import TlsFiles

_ADDRESS: Final = re.compile(r"[^:/\s]+:([0-9]{1,5})")
_TOP_PORT: Final = 65_535


def checked_address(value: str) -> str:
    """Return `value` when it is host:port. Raises: ValueError saying what was wanted.

    The libraries below would take port 70000 for 4464.
    """
    match = _ADDRESS.fullmatch(value)
    if match is None or int(match[1]) > _TOP_PORT:
        raise ValueError(f"found {value!r}, wanted host:port, the port at most {_TOP_PORT}")
    return value


Address = Annotated[str, AfterValidator(checked_address)]
_TABLE: Final = re.compile(r"\s*(\[\[?)\s*([\w.-]+)\s*\]")
_KEY: Final = re.compile(r"\s*([\w-]+)\s*[.=]")
MAX_CHARS: Final = 128 * 1024
_DEEP: Final = re.compile(r"(?<![\w.-])(?:[\w-]++[ \t]*+\.[ \t]*+){32}")
"""A dotted key so deep that reading it takes time that grows with its square."""
_Model = TypeVar("_Model", bound=BaseModel)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names file, key and cure."""


class StrictConfig(BaseModel):
    """Frozen; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TlsConfig(StrictConfig):
    """[tls]: PEM files. The key was made here and stays here."""

    ca: Path
    certificate: Path
    key: Path

    def below(self, folder: Path) -> "TlsConfig":
        """The same files, relative paths taken from `folder`."""
        return TlsConfig(
            ca=folder / self.ca, certificate=folder / self.certificate, key=folder / self.key
        )

    def files(self) -> TlsFiles:
        """The three as a channel wants them."""
        return TlsFiles(ca=self.ca, certificate=self.certificate, key=self.key)


class NoConfigError(ConfigError):
    """There is no such file: the folder is another's, most likely."""


def read_toml(path: Path, model: type[_Model]) -> _Model:
    """Parse a strict TOML file.

    Raises: ConfigError.
    """
    return checked(path, toml_values(path), model)


def toml_values(path: Path) -> dict[str, Any]:
    """Parse a TOML file whose keys nobody has looked at yet.

    Raises: ConfigError.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > MAX_CHARS:
            raise ValueError(f"found {len(text)} characters, wanted at most {MAX_CHARS}")
        if _DEEP.search(text):
            raise ValueError("found a key of 32 levels or more")
        return tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NoConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, 10,000 brackets
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def checked(path: Path, values: Mapping[str, Any], model: type[_Model]) -> _Model:
    """Hold a file's values against their model; the file may be about to be written.

    Raises: ConfigError.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A key that is unknown is the likely reason why another is missing: it is told first.
        first, *others = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        place, found = _place(values, first["loc"])
        there = first["type"] != "missing" and found == first["input"] and path.is_file()
        line = f":{line_of(path.read_text(encoding='utf-8'), place)}" if there and place else ""
        if first["type"] == "missing":
            place = (*place, first["loc"][-1])
        words = in_words({**first, "loc": place}, model)
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{path}{line}: {words}{more}") from error


def line_of(text: str, place: Sequence[str | int]) -> int:
    """Line of the deepest key of `place` that a TOML text names, counted from 1; 0: of none."""
    wanted = tuple(str(part) for part in place)
    table: tuple[str, ...] = ()
    rows: dict[str, int] = {}
    deepest, found = 0, 0
    for number, line in enumerate(text.splitlines(), start=1):
        if header := _TABLE.match(line):
            name = header[2]
            table = tuple(name.split("."))
            if header[1] == "[[":
                rows[name] = rows.get(name, -1) + 1
                table = (*table, str(rows[name]))
            here = table
        elif key := _KEY.match(line):
            here = (*table, key[1])
        else:
            continue
        if here == wanted[: len(here)] and len(here) > deepest:
            deepest, found = len(here), number
    return found


def _place(values: Any, loc: Sequence[str | int]) -> tuple[tuple[str | int, ...], Any]:
    """Where a fault is, as the file would say it, without the tags of unions; and what is there."""
    place: list[str | int] = []
    for part in loc:
        rows = values if isinstance(values, list | tuple) else ()
        known = values if isinstance(values, Mapping) else dict(enumerate(rows))
        if part in known:
            values = known[part]
            place.append(part)
    return tuple(place), values


def toml_text(values: Mapping[str, Any]) -> str:
    """Write plain values and one level of tables, which is all our files hold."""
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in values.items() if key not in tables}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in table.items())]
    return "\n".join(lines) + "\n"
