"""Where only a proxy leads out: TLS goes through HTTP CONNECT unopened."""

import base64
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from protos.errors import RemoteError
from protos.v1 import transfer_pb2
from tests.integration.transfer_site import MIB, Site, make_file, start_site

__all__ = ["start_site"]


class ConnectProxy:
    """An HTTP proxy that knows CONNECT alone, and whose users have a password if it has one."""

    def __init__(self, password: str = "") -> None:
        self.asked: list[str] = []
        self._wanted = b"basic " + base64.b64encode(f"user:{password}".encode()).lower()
        self._password = password
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        with near, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += near.recv(1)
            verb, target, _ = head.split(b"\r\n")[0].split(b" ")
            if verb != b"CONNECT" or (self._password and self._wanted not in head.lower()):
                near.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
                return
            self.asked.append(target.decode())
            host, _, port = target.decode().rpartition(":")
            with socket.create_connection((host, int(port))) as far:
                near.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                back = threading.Thread(target=_pump, args=(far, near), daemon=True)
                back.start()
                _pump(near, far)
                back.join()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


@pytest.fixture
def make_proxy() -> Iterator[Callable[..., ConnectProxy]]:
    made: list[ConnectProxy] = []

    def make(password: str = "") -> ConnectProxy:
        made.append(ConnectProxy(password))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


def through(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Set the environment of a place whose only way out is `url`."""
    for name in ("no_proxy", "NO_PROXY", "grpc_proxy", "http_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", url)


@pytest.mark.parametrize("password", ["", "secret"])
def test_an_upload_goes_through_the_proxy_of_the_environment(
    start_site: Callable[..., Site],
    make_proxy: Callable[..., ConnectProxy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    password: str,
) -> None:
    site, proxy = start_site(), make_proxy(password)
    path, sha256 = make_file(tmp_path, 3 * MIB)
    user = f"user:{password}@" if password else ""
    through(monkeypatch, f"http://{user}127.0.0.1:{proxy.port}")
    site.client().put(path, sha256, transfer_pb2.CONTRIBUTION)
    assert site.artifacts.has(sha256)
    assert proxy.asked == [site.proxy.address]


def test_a_proxy_that_refuses_is_named_as_the_cause(
    start_site: Callable[..., Site],
    make_proxy: Callable[..., ConnectProxy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    site, proxy = start_site(), make_proxy("secret")
    path, sha256 = make_file(tmp_path, 10)
    through(monkeypatch, f"http://127.0.0.1:{proxy.port}")
    with pytest.raises(RemoteError, match=r"(?i)proxy|407") as caught:
        site.client(patience_s=0.1).put(path, sha256, transfer_pb2.CONTRIBUTION)
    assert caught.value.error_id == "unreachable"
    assert proxy.asked == []


def test_no_proxy_goes_straight(
    start_site: Callable[..., Site],
    make_proxy: Callable[..., ConnectProxy],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    site, proxy = start_site(), make_proxy()
    path, sha256 = make_file(tmp_path, 10)
    through(monkeypatch, f"http://127.0.0.1:{proxy.port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    site.client().put(path, sha256, transfer_pb2.CONTRIBUTION)
    assert proxy.asked == []
