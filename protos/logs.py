"""Logs of both programs: one JSON object a line on stderr, UTC, an event code, no payloads.

A line can be trusted with hostile input: control characters are spelled out, values are cut, and
of anything that is not a plain value only the type's name is written.
"""

import json
import logging
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import IO, Any, Final

from protos.printable import printable

# structlog takes rich along, where that is installed, for consoles. We print JSON, and each of our
# processes would start a tenth of a second later for it.
if "rich" in sys.modules:
    import structlog
else:
    sys.modules["rich"] = None  # type: ignore[assignment]  # that is: not to be had
    import structlog

    del sys.modules["rich"]

MAX_VALUES: Final = 32
"""Fields of a line, and items of a list."""
_FRAMES: Final = 8
_LIBRARY: Final = "library.message"
"""Event code of what a library logs; its words are in `message`."""
_RESERVED: Final = frozenset({"time", "level", "event", "program", "logger"})

Logger = structlog.stdlib.BoundLogger


def logger(name: str) -> Logger:
    """A logger whose calls take an event code and fields: log.info("round.done", round_id=...).

    Before configure() it is a plain stdlib logger, which shows warnings and errors.
    """
    wrapped: Logger = structlog.wrap_logger(
        logging.getLogger(name),
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=Logger,
        cache_logger_on_first_use=False,
    )
    return wrapped


def configure(program: str, *, stream: IO[str] | None = None, level: str = "info") -> None:
    """Send every log of this process, libraries' too, to `stream` (default: stderr) as JSON lines.

    Args: level: lowest level of our own logs; libraries speak from warning on.
    """
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[lambda _logger, _method, values: _line(program, values)],
    )
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for ours in ("cofuse", "coordinator", "participant", "protos"):
        logging.getLogger(ours).setLevel(level.upper())


def _line(program: str, values: MutableMapping[str, Any]) -> str:
    record: logging.LogRecord = values.pop("_record")
    ours = values.pop("_from_structlog")
    error = values.pop("exc_info", None)
    event = values.pop("event")
    when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
    line: dict[str, Any] = {
        "time": when.replace("+00:00", "Z"),
        "level": record.levelname.lower(),
        "event": printable(str(event)) if ours else _LIBRARY,
        "program": program,
        "logger": record.name,
    }
    fields = {} if ours else {"message": event}
    fields |= {k: v for k, v in values.items() if k not in _RESERVED}
    line |= {key: _plain(value) for key, value in list(fields.items())[:MAX_VALUES]}
    return json.dumps(line | _told(error))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    if isinstance(value, BaseException):
        return printable(f"{type(value).__name__}: {value}")
    if isinstance(value, Mapping):
        return {printable(str(k)): _shallow(v) for k, v in list(value.items())[:MAX_VALUES]}
    if isinstance(value, list | tuple | set | frozenset):
        return [_shallow(item) for item in list(value)[:MAX_VALUES]]
    return f"<{type(value).__name__}>"


def _shallow(value: Any) -> Any:
    """A value inside another: no deeper nesting, so that no payload hides in one."""
    nested = isinstance(value, Mapping | list | tuple | set | frozenset)
    return f"<{type(value).__name__}>" if nested else _plain(value)


def _told(error: Any) -> dict[str, Any]:
    """An exception as two fields: its words, and where it came from, innermost first."""
    if error is True:
        error = sys.exc_info()
    raised = error[1] if isinstance(error, tuple) else error
    if not isinstance(raised, BaseException):
        return {}
    frames = traceback.extract_tb(raised.__traceback__)[-_FRAMES:]
    where = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames)]
    return {"error": _plain(raised), "where": where}
