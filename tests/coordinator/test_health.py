"""Ready means that work would succeed; alive means that a restart would not help."""

import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2 as pb

from coordinator import health as health_module
from coordinator.health import Health, HealthService
from coordinator.ops_http import OpsServer


class Disk:
    """A check whose answer the test decides."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def check(self) -> None:
        if self.error is not None:
            raise self.error


class Context:
    """What the servicer asks of a call."""

    def __init__(self) -> None:
        self.code: grpc.StatusCode | None = None
        self.active = True

    def is_active(self) -> bool:
        return self.active

    def set_trailing_metadata(self, metadata: Any) -> None:
        pass

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.code = code
        raise RuntimeError(details)


@contextmanager
def _served(health: Health) -> Iterator[str]:
    server = OpsServer("127.0.0.1:0", health, lambda: b"fed_rounds 1\n")
    server.start()
    try:
        yield f"http://{server.address}"
    finally:
        server.stop()


def _get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=5) as got:
            return got.status, got.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_is_unready_until_it_was_checked_and_while_a_check_fails() -> None:
    disk = Disk()
    health = Health({"artifacts": disk.check, "database": lambda: None})
    with _served(health) as url:
        assert _get(f"{url}/readyz")[0] == 503
        health.check()
        assert _get(f"{url}/readyz") == (200, '{"ready": true, "problems": {}}\n')
        disk.error = OSError(28, "No space left on device")
        health.check()
        status, body = _get(f"{url}/readyz")
        assert status == 503
        assert '"artifacts": "OSError: [Errno 28] No space left on device"' in body
        assert _get(f"{url}/livez") == (200, "alive\n")  # a restart would not make room
        disk.error = None
        health.check()
        assert _get(f"{url}/readyz")[0] == 200


def test_a_check_that_hangs_makes_it_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    health = Health({})
    health.check()
    assert health.alive
    assert not health.problems()
    monkeypatch.setattr(health_module, "STALE_S", 0.0)
    assert not health.alive
    assert "hangs" in health.problems()["checks"]


def test_the_watchdog_is_fed_only_while_the_loops_turn() -> None:
    beats, fed = [], threading.Event()
    alive = [True]

    def beat() -> None:
        beats.append(len(beats))
        fed.set()

    rounds = threading.Semaphore(0)
    health = Health({"count": rounds.release}, alive=lambda: alive[0], beat=beat, every_s=0.01)
    health.start()
    assert fed.wait(5)
    alive[0] = False
    rounds.acquire(timeout=5)
    while rounds.acquire(blocking=False):
        pass
    for _ in range(3):  # two whole rounds of checks later
        assert rounds.acquire(timeout=5)
    count = len(beats)
    for _ in range(3):
        assert rounds.acquire(timeout=5)
    assert len(beats) == count
    health.stop()
    health.join()


def test_paths_hosts_and_methods_that_are_not_served() -> None:
    health = Health({})
    health.check()
    with _served(health) as url:
        assert _get(f"{url}/metrics") == (200, "fed_rounds 1\n")
        assert _get(f"{url}/etc/passwd")[0] == 404
        assert _get(f"{url}/metrics", Host="evil.example")[0] == 421
        request = urllib.request.Request(f"{url}/metrics", data=b"x", method="POST")
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(request, timeout=5)


def test_whoever_watches_hears_not_serving_and_then_the_end() -> None:
    disk = Disk()
    health = Health({"disk": disk.check})
    health.check()
    answers = HealthService(health).Watch(pb.HealthCheckRequest(), Context())
    statuses = [next(answers).status]
    disk.error = OSError("full")
    health.check()
    statuses.append(next(answers).status)
    disk.error = None
    health.check()
    statuses.append(next(answers).status)
    health.stop()
    statuses += [answer.status for answer in answers]
    serving, not_serving = pb.HealthCheckResponse.SERVING, pb.HealthCheckResponse.NOT_SERVING
    assert statuses == [serving, not_serving, serving, not_serving]


def test_a_watcher_that_leaves_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    health = Health({})
    health.check()
    context = Context()
    answers = HealthService(health).Watch(pb.HealthCheckRequest(), context)
    next(answers)
    context.active = False
    monkeypatch.setattr(health_module, "EVERY_S", 0.0)
    assert list(answers) == []


def test_there_is_one_service_to_ask_about() -> None:
    context = Context()
    with pytest.raises(RuntimeError, match="ask without a service name"):
        HealthService(Health({})).Check(pb.HealthCheckRequest(service="Fleet"), context)
    assert context.code is grpc.StatusCode.NOT_FOUND
