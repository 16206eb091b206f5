"""A log line is one line, tells when and what, and can be trusted with hostile values."""

import ast
import io
import json
import logging
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.logs import MAX_VALUES, configure, logger
from protos.printable import MAX_TEXT, printable

ROOT = Path(__file__).parents[2]
CODE = re.compile(r"[a-z]+(\.[a-z]+(_[a-z]+)*)+")


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """Logs of this process as text; the handlers of before come back at the end."""
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    text = io.StringIO()
    configure("coordinator", stream=text)
    yield text
    root.handlers[:] = before
    root.setLevel(level)


def _lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_when_what_who_and_the_fields(stream: io.StringIO) -> None:
    logger("coordinator.main").info("round.done", round_id="rnd-1", seconds=1.5, parts=["a", "b"])
    line = _lines(stream)[0]
    when = datetime.fromisoformat(line.pop("time"))
    assert when.tzinfo == UTC
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)
    assert line == {
        "level": "info",
        "event": "round.done",
        "program": "coordinator",
        "logger": "coordinator.main",
        "round_id": "rnd-1",
        "seconds": 1.5,
        "parts": ["a", "b"],
    }


@given(
    st.text()
    | st.dictionaries(st.text(), st.text() | st.binary())
    | st.lists(st.text())
    | st.binary()
)
def test_whatever_the_value_a_call_is_one_line_of_printable_ascii(value: Any) -> None:
    root = logging.getLogger()
    before = root.handlers[:]
    text = io.StringIO()
    configure("coordinator", stream=text)
    logger("coordinator").warning("test.value", value=value, time="never", event_="x")
    root.handlers[:] = before
    written = text.getvalue()
    assert written.endswith("\n")
    assert re.fullmatch(r"[\x20-\x7e]+", written[:-1])
    assert json.loads(written)["time"] != "never"


def test_a_decoded_value_cannot_move_the_cursor_or_add_a_line() -> None:
    hostile = "a\x1b[2J\r\nb\u202ec\x00\x9b\u2028"
    assert printable(hostile) == "a\\x1b[2J\\r\\nb\\u202ec\\x00\\x9b\\u2028"


def test_long_values_and_many_fields_are_cut_and_the_cut_is_said(stream: io.StringIO) -> None:
    fields = {f"field{i}": i for i in range(100)}
    logger("coordinator").info("test.long", text="x" * 100_000, items=list(range(999)), **fields)
    line = _lines(stream)[0]
    assert line["text"] == "x" * MAX_TEXT + "... (99000 more)"
    assert len(line["items"]) == MAX_VALUES
    assert len(line) == 5 + MAX_VALUES


def test_payloads_are_named_not_written(stream: io.StringIO) -> None:
    logger("coordinator").info(
        "test.payload", raw=b"private", nested={"text": ["private"]}, thing=_Payload()
    )
    assert "private" not in stream.getvalue()
    line = _lines(stream)[0]
    assert line["raw"] == "<7 bytes>"
    assert line["nested"] == {"text": "<list>"}
    assert line["thing"] == "<_Payload>"


class _Payload:
    def __repr__(self) -> str:
        return "private"


def test_an_exception_is_two_fields_of_the_same_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("found x,\nwanted y")
    except ValueError:
        logger("coordinator").error("test.failed", exc_info=True)
        logging.getLogger("some.library").exception("it broke: %s", "badly")
    ours, theirs = _lines(stream)
    assert ours["error"] == theirs["error"] == "ValueError: found x,\\nwanted y"
    assert "test_an_exception" in ours["where"][0]
    assert (theirs["event"], theirs["message"]) == ("library.message", "it broke: badly")
    assert theirs["logger"] == "some.library"


def test_libraries_speak_from_warning_on_and_we_from_info_on(stream: io.StringIO) -> None:
    logging.getLogger("some.library").info("chatter")
    logger("coordinator").debug("test.debug")
    logger("participant").info("test.info")
    assert [line["event"] for line in _lines(stream)] == ["test.info"]


def test_every_event_of_ours_is_a_code() -> None:
    """`noun.verb`: stable words that an alert can match."""
    found = 0
    for path in [
        p for d in ("coordinator", "participant", "protos") for p in ROOT.glob(f"{d}/**/*.py")
    ]:
        text = path.read_text(encoding="utf-8")
        if "protos.logs import" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and _is_log(node.func):
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}"
                assert CODE.fullmatch(str(node.args[0].value)), f"{path}:{node.lineno}"
                found += 1
    assert found


def _is_log(function: ast.expr) -> bool:
    levels = {"debug", "info", "warning", "error", "exception", "critical"}
    return (
        isinstance(function, ast.Attribute)
        and function.attr in levels
        and isinstance(function.value, ast.Name)
        and function.value.id == "_LOG"
    )
