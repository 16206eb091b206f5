"""An ASGI application on a port, in a thread of its own."""

import socket
import threading
from pathlib import Path
from typing import Any, Final

import uvicorn

_DRAIN_S: Final = 2
"""How long open answers may go on at the end."""
_IDLE_S: Final = 30


class WebServer:
    """Serves from start() until stop().

    Args: listen: host:port; port 0 picks a free one. certificate, key: PEM files for HTTPS.
    Raises: OSError when the port is taken.
    """

    def __init__(
        self, app: Any, listen: str, *, certificate: Path | None = None, key: Path | None = None
    ) -> None:
        host, _, port = listen.rpartition(":")
        self._socket = socket.create_server((host, int(port)))
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                lifespan="off",
                server_header=False,
                ws="none",
                proxy_headers=False,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=_DRAIN_S,
                limit_concurrency=1000,
                ssl_certfile=certificate,
                ssl_keyfile=key,
            )
        )
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="web", daemon=True
        )
        self.url = f"{'https' if certificate else 'http'}://{host}:{self._socket.getsockname()[1]}"

    def start(self) -> None:
        """Begin to answer; connections are taken from the constructor on."""
        self._thread.start()

    def wait(self) -> None:
        """Wait until it has ended."""
        self._thread.join()

    def end(self) -> None:
        """Begin to stop; for handlers of signals."""
        self._server.should_exit = True

    def stop(self) -> None:
        """Answer no more."""
        self.end()
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()
