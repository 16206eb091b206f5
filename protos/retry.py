"""Repeat what repeats safely while the other side is away; refusals are final."""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

import grpc

from protos.errors import CofuseError, RemoteError, remote_errors

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")
_LOST: Final = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
)
_AGAIN: Final = frozenset(
    {"wrong_offset", "truncated_upload", "wrong_chunk", "stalled", "storage_full"}
)
"""Refusals that a repetition cures: it asks first where to go on."""
PATIENCE_S: Final = 300.0
"""How long nothing may get through before the work is given back."""
_FIRST_PAUSE_S: Final = 0.2
_LONGEST_PAUSE_S: Final = 5.0


class Stopped(Exception):  # noqa: N818 - not an error
    """We were asked to stop; the work goes on at the next start."""


class Patience:
    """How long to go on trying: anew whenever more has got through than ever before."""

    def __init__(
        self, stop: threading.Event | None = None, *, patience_s: float = PATIENCE_S
    ) -> None:
        """Args: stop: once set, a call that would be repeated raises Stopped instead."""
        self._stop = stop or threading.Event()
        self._patience_s = patience_s
        self._best_bytes = 0
        self._pause_s = _FIRST_PAUSE_S
        self._deadline_s = time.monotonic() + patience_s

    def advanced(self, total_bytes: int) -> None:
        """So many bytes have got through in all."""
        if total_bytes > self._best_bytes:
            self._best_bytes = total_bytes
            self._reset()

    def repeat(self, call: Callable[[], _T]) -> _T:
        """Call until it returns.

        Raises: RemoteError of a final refusal, or of the last failure when patience ends; Stopped.
        """
        while True:
            try:
                with remote_errors():
                    return call()
            except (RemoteError, CofuseError) as error:
                if error.error_id not in _AGAIN:
                    raise RemoteError(error.error_id, str(error)) from None
                failure: RemoteError | CofuseError = error
            except grpc.RpcError as error:
                if error.code() not in _LOST:
                    raise
                failure = CofuseError("unreachable", f"coordinator not reached: {error.details()}")
            if time.monotonic() > self._deadline_s:
                raise RemoteError(failure.error_id, str(failure)) from None
            _LOG.warning("%s Trying again.", failure)
            # Jitter: those that lost one coordinator together must not return together.
            if self._stop.wait(self._pause_s * random.uniform(0.5, 1.5)):  # noqa: S311
                raise Stopped
            self._pause_s = min(_LONGEST_PAUSE_S, self._pause_s * 2)

    def _reset(self) -> None:
        self._deadline_s = time.monotonic() + self._patience_s
        self._pause_s = _FIRST_PAUSE_S
