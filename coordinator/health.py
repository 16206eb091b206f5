"""Whether the coordinator can work: checked every few seconds, told by gRPC, HTTP and systemd.

Ready: its database and its artifacts take writes. Alive: its loops turn. A full disk makes it
unready, which a restart would not cure; a loop that hangs makes it dead, which a restart cures.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc

from protos.errors import CofuseError, abort
from protos.logs import logger
from protos.printable import printable

_LOG = logger(__name__)
EVERY_S: Final = 5.0
STALE_S: Final = 45.0
"""A check that takes longer hangs: the database itself waits at most 30 s for its turn."""
_JOIN_S: Final = 1.0
_STATUS = pb.HealthCheckResponse


class Health:
    """Runs the checks and remembers what they said.

    Args:
        checks: by name; each returns, or raises what is wrong.
        alive: whether the program's own loops turn.
        beat: called after every round of checks while alive (the service manager's watchdog).
    """

    def __init__(
        self,
        checks: Mapping[str, Callable[[], None]],
        *,
        alive: Callable[[], bool] = lambda: True,
        beat: Callable[[], object] = lambda: None,
        every_s: float = EVERY_S,
    ) -> None:
        self._checks = checks
        self._alive = alive
        self._beat = beat
        self._every_s = every_s
        self._changed = threading.Condition()
        self._failures: dict[str, str] = {"start": "not checked yet"}
        self._checked = time.monotonic()
        self.stopping = threading.Event()
        """Set once no new work is wanted."""
        self._thread = threading.Thread(target=self._run, name="health", daemon=True)

    def start(self) -> None:
        """Check once, then go on in a thread."""
        self.check()
        self._thread.start()

    def stop(self) -> None:
        """Be unready from now on, and say so first to whoever watches."""
        with self._changed:
            self.stopping.set()
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the thread of checks, unless one hangs."""
        self._thread.join(_JOIN_S)

    def check(self) -> None:
        """Run every check now."""
        failures = {name: words for name, run in self._checks.items() if (words := _tried(run))}
        with self._changed:
            if failures != self._failures:
                (_LOG.warning if failures else _LOG.info)("health.changed", failures=failures)
            self._failures, self._checked = failures, time.monotonic()
            self._changed.notify_all()

    def problems(self) -> dict[str, str]:
        """What keeps the coordinator from working, by name; empty: it is ready."""
        found = dict(self._failures)
        if self.stopping.is_set():
            found["stopping"] = "takes no new work"
        if (age := time.monotonic() - self._checked) > STALE_S:
            found["checks"] = f"the last one hangs since {age:.0f} s"
        return found

    @property
    def alive(self) -> bool:
        """Whether its loops turn; if not, a restart is the cure."""
        return time.monotonic() - self._checked <= STALE_S and self._alive()

    def wait_change(self, before: Mapping[str, str], timeout_s: float) -> None:
        """Wait until it becomes ready or unready, unlike `before`, or the time is over."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self.problems()) != bool(before), timeout_s)

    def _run(self) -> None:
        while not self.stopping.wait(self._every_s):
            self.check()
            if self._alive():
                self._beat()


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The standard health protocol, for the whole server (service name "")."""

    def __init__(self, health: Health) -> None:
        self._health = health

    def Check(self, request: pb.HealthCheckRequest, context: Any) -> pb.HealthCheckResponse:
        """Whether the coordinator is ready."""
        _require_whole(request, context)
        return _reply(self._health.problems())

    def Watch(
        self, request: pb.HealthCheckRequest, context: Any
    ) -> Iterator[pb.HealthCheckResponse]:
        """The same at each change, until the coordinator stops or the caller leaves."""
        _require_whole(request, context)
        told: bool | None = None
        while context.is_active():
            last = self._health.stopping.is_set()  # asked first: a stop in between comes around
            problems = self._health.problems()
            if bool(problems) is not told:
                told = bool(problems)
                yield _reply(problems)
            if last:
                return
            self._health.wait_change(problems, EVERY_S)


def _require_whole(request: pb.HealthCheckRequest, context: Any) -> None:
    if request.service:
        says = f"service: found {request.service!r}, wanted nothing: the server is one"
        abort(context, CofuseError("unknown_service", says))


def _reply(problems: Mapping[str, str]) -> pb.HealthCheckResponse:
    return _STATUS(status=_STATUS.NOT_SERVING if problems else _STATUS.SERVING)


def _tried(run: Callable[[], None]) -> str:
    try:
        run()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what the check found
        return printable(f"{type(error).__name__}: {error}")
    return ""
