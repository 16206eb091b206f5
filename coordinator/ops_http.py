"""/livez, /readyz and /metrics for the machine's own monitoring: loopback only, read only."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final

from coordinator.health import Health

_IDLE_S: Final = 5.0
_OWN_NAMES: Final = frozenset({"localhost", "127.0.0.1", ""})


class OpsServer:
    """Serves from start() until stop().

    Args: address: host:port on loopback; port 0 picks a free one. metrics: Prometheus' text.
    Raises: OSError when the port is taken.
    """

    def __init__(self, address: str, health: Health, metrics: Callable[[], bytes]) -> None:
        host, _, port = address.rpartition(":")
        self._server = _Server((host, int(port)), _handler(health, metrics))
        self._thread = threading.Thread(
            target=self._server.serve_forever,
            kwargs={"poll_interval": 0.1},
            name="ops",
            daemon=True,
        )

    @property
    def address(self) -> str:
        """host:port, with the port that was picked."""
        host, port = self._server.server_address[:2]
        return f"{host!s}:{port}"

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that says nothing must not hold up the end

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet: a monitor that hangs up is no news."""


def _handler(health: Health, metrics: Callable[[], bytes]) -> type[BaseHTTPRequestHandler]:
    def answer(path: str) -> tuple[int, str, bytes]:
        if path == "/livez":
            return (
                (200, "text/plain", b"alive\n") if health.alive else (503, "text/plain", b"dead\n")
            )
        if path == "/readyz":
            problems = health.problems()
            body = json.dumps({"ready": not problems, "problems": problems}) + "\n"
            return 503 if problems else 200, "application/json", body.encode()
        if path == "/metrics":
            return 200, "text/plain; version=0.0.4; charset=utf-8", metrics()
        return 404, "text/plain", b"found another path, wanted /livez, /readyz or /metrics\n"

    class Handler(BaseHTTPRequestHandler):
        timeout = _IDLE_S  # also of a client that opens a connection and is silent
        server_version = "cofuse"
        sys_version = ""

        def do_GET(self) -> None:
            # A page in the operator's browser may name this port by a domain of its own.
            host = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            status, kind, body = answer(self.path)
            if host not in _OWN_NAMES:
                status, kind, body = 421, "text/plain", b"found another host, wanted 127.0.0.1\n"
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Keep quiet: it is asked every few seconds."""

    return Handler
