"""`cofuse schema | config`: every key there is, what it may say, and what it says here."""

import json
import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from cofuse.commands.connection import answer, fail, tell
from cofuse.profile import profile_path, remembered

if TYPE_CHECKING:
    from pydantic import BaseModel

MODELS: Final = {
    "round": ("protos.spec", "RoundSpec"),
    "recurring": ("protos.recurring", "RecurringSpec"),
    "lock": ("cofuse.round_lock", "Lock"),
    "policy": ("participant.policy", "Policy"),
    "participant": ("participant.config", "ParticipantConfig"),
    "coordinator": ("coordinator.config", "CoordinatorConfig"),
}
"""What `cofuse schema` describes, and the model that reads it."""
_FILES: Final = {
    "participant.toml": "participant",
    "coordinator.toml": "coordinator",
    "policy.toml": "policy",
}
_ENVIRONMENT: Final = {"at": "COFUSE_AT", "identity": "COFUSE_IDENTITY"}


def schema(
    of: Annotated[str, typer.Argument(help=", ".join(MODELS))],
) -> None:
    """Print the JSON Schema of a file, for editors: `cofuse schema round > round.schema.json`."""
    if of not in MODELS:
        fail(f"found no schema of {of!r}, wanted one of {', '.join(MODELS)}", 2)
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema", **_schema(of)}
    tell(json.dumps(found, indent=2))
    answer(found)


def config(
    folder: Annotated[
        Path | None, typer.Argument(help="A participant's or coordinator's.  [what is remembered]")
    ] = None,
    origin: Annotated[
        bool, typer.Option("--origin", help="Say of each value where it comes from.")
    ] = False,
) -> None:
    """Show what is in force: option, then environment, then file or login, then default."""
    rows = list(_of_commands()) if folder is None else list(_of_folder(folder))
    if not rows:
        names = ", ".join(_FILES)
        fail(f"{folder}: found none of {names}, wanted one", code="no_folder")
    width = max(len(row["key"]) for row in rows)
    for row in rows:
        where = f"   # {row['origin']}" if origin else ""
        tell(f"{row['key']:<{width}} = {json.dumps(row['value'], default=str)}{where}")
    answer({"values": json.loads(json.dumps(rows, default=str))})


def _schema(of: str) -> dict[str, Any]:
    found: dict[str, Any] = _model(of).model_json_schema()
    return found


def _model(of: str) -> "type[BaseModel]":
    module, name = MODELS[of]
    found: type[BaseModel] = getattr(import_module(module), name)
    return found


def _of_commands() -> Iterator[dict[str, Any]]:
    """Where commands go when no option says it."""
    for key, variable in _ENVIRONMENT.items():
        if value := os.environ.get(variable):
            yield {"key": key, "value": value, "origin": f"environment, {variable}"}
        elif value := remembered(key):
            yield {"key": key, "value": value, "origin": f"cofuse login, {profile_path()}"}
        else:
            yield {"key": key, "value": None, "origin": "nowhere"}


def _of_folder(folder: Path) -> Iterator[dict[str, Any]]:
    from protos.config import read_toml, toml_values

    for name, of in _FILES.items():
        path = folder / name
        if path.is_file():
            found = read_toml(path, _model(of))
            yield from _rows(found, toml_values(path), path, f"{of}." if of == "policy" else "")


def _rows(
    model: "BaseModel", said: Mapping[str, Any], path: Path, lead: str
) -> Iterator[dict[str, Any]]:
    """A row for each key, tables first looked into."""
    from pydantic import BaseModel

    for key in type(model).model_fields:
        value = getattr(model, key)
        if isinstance(value, BaseModel):
            yield from _rows(value, said.get(key, {}), path, f"{lead}{key}.")
        else:
            plain = model.model_dump(mode="json", include={key})[key]
            origin = str(path) if key in said else "default"
            yield {"key": lead + key, "value": plain, "origin": origin}
