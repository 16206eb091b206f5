"""What is told of the end of a call, by how it ended."""

import logging
from typing import Any

import grpc
import pytest

from coordinator import observe
from coordinator.observe import observing
from protos.errors import CofuseError

METHOD = "/cofuse.v1.Test/Call"


class Nobody:
    """A call without a certificate."""

    def auth_context(self) -> dict[str, Any]:
        return {}


class GoneError(Exception):
    """A server's own word for a caller that left."""


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[grpc.StatusCode]:
    """The status of every call that is counted."""
    found: list[grpc.StatusCode] = []
    monkeypatch.setattr(observe, "observe_rpc", lambda _method, code, _seconds: found.append(code))
    return found


@pytest.mark.parametrize(
    ("error", "code", "leaves", "lines"),
    [
        (None, grpc.StatusCode.OK, None, 0),
        (CofuseError("wrong_state", "x"), grpc.StatusCode.FAILED_PRECONDITION, CofuseError, 1),
        (GoneError(), grpc.StatusCode.CANCELLED, GoneError, 0),
        (GeneratorExit(), grpc.StatusCode.CANCELLED, GeneratorExit, 0),
        (ZeroDivisionError("x"), grpc.StatusCode.INTERNAL, CofuseError, 1),
    ],
)
def test_every_end_is_counted_once_and_only_a_refusal_is_a_line(
    codes: list[grpc.StatusCode],
    caplog: pytest.LogCaptureFixture,
    error: BaseException | None,
    code: grpc.StatusCode,
    leaves: type[BaseException] | None,
    lines: int,
) -> None:
    caplog.set_level(logging.INFO, "coordinator")
    found: BaseException | None = None
    try:
        with observing(METHOD, Nobody(), gone=(*observe.GONE, GoneError)):
            if error is not None:
                raise error
    except BaseException as raised:  # noqa: BLE001 - what left is what is asked
        found = raised
    assert (type(found) if found else None) is leaves
    assert codes == [code]
    assert len(caplog.records) == lines


def test_a_refusal_that_grpc_ends_its_own_way_is_still_the_refusal(
    codes: list[grpc.StatusCode],
) -> None:
    refusal = CofuseError("not_allowed", "x")
    with pytest.raises(GoneError), observing(METHOD, Nobody()):
        raise GoneError from refusal
    assert codes == [grpc.StatusCode.PERMISSION_DENIED]
