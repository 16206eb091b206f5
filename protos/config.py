"""Strict TOML for both programs: unknown keys are errors, relative paths start at the file."""

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from protos.tls import TlsFiles

Address = Annotated[str, StringConstraints(pattern=r"^[^:/\s]+:[0-9]{1,5}$")]
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
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:  # no TOML, no UTF-8, 10,000 brackets
        raise ConfigError(f"{path}: is not TOML: {error}") from error


def checked(path: Path, values: Mapping[str, Any], model: type[_Model]) -> _Model:
    """Hold a file's values against their model.

    Raises: ConfigError.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        known = ", ".join(model.model_fields)
        raise ConfigError(f"{path}: {place}: {first['msg']} (top keys: {known})") from error


def toml_text(values: Mapping[str, Any]) -> str:
    """Write plain values and one level of tables, which is all our files hold."""
    tables = {key: value for key, value in values.items() if isinstance(value, Mapping)}
    plain = {key: value for key, value in values.items() if key not in tables}
    lines = [f"{key} = {json.dumps(value)}" for key, value in plain.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(v)}" for key, v in table.items())]
    return "\n".join(lines) + "\n"
