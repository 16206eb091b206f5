"""A recording proxy on loopback: it ends TLS on both sides and keeps every byte in the clear.

It stands between a participant and a coordinator with the certificates of both, which only a test
has, so what it records is all that crosses the wire.
"""

import contextlib
import socket
import ssl
import threading
from pathlib import Path
from typing import Final

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_HEADER: Final = 9
_DATA: Final = 0


class Recorder:
    """Listens on a free port and relays to `target`, once that is set."""

    def __init__(self, ca: Path, server: tuple[Path, Path], *, http2: bool) -> None:
        """Args: server: certificate and key to answer with. http2: speak what gRPC speaks."""
        self.target = ""
        self._ca = ca
        self._http2 = http2
        self._accept_tls = self._prepared(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), server)
        self._accept_tls.load_verify_locations(ca)
        self._accept_tls.verify_mode = ssl.CERT_REQUIRED
        self._clients: dict[bytes, tuple[str, ssl.SSLContext]] = {}
        self._streams: list[tuple[str, bytearray]] = []
        self._answers: list[tuple[str, bytearray]] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def admit(self, name: str, certificate: Path, key: Path) -> None:
        """Relay this client under its own certificate."""
        tls = ssl.create_default_context(cafile=str(self._ca))
        der = ssl.PEM_cert_to_DER_cert(certificate.read_text(encoding="ascii"))
        self._clients[der] = name, self._prepared(tls, (certificate, key))

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def outbound(self, name: str) -> bytes:
        """Everything the client sent: raw, and again with HTTP/2's framing taken out."""
        raw = [bytes(stream) for who, stream in self._streams if who == name]
        return b"\n".join([*raw, *(_payload(stream) for stream in raw)])

    def inbound_data(self, name: str) -> bytes:
        """What the messages to the client held, HTTP/2's framing taken out."""
        return b"".join(_data(bytes(stream)) for who, stream in self._answers if who == name)

    def connections(self, name: str) -> int:
        """How often the client has connected."""
        return sum(who == name for who, _ in self._streams)

    def _prepared(self, tls: ssl.SSLContext, pair: tuple[Path, Path]) -> ssl.SSLContext:
        tls.load_cert_chain(*pair)
        if self._http2:
            tls.set_alpn_protocols(["h2"])
        return tls

    def _accept(self) -> None:
        while True:
            try:
                plain, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._relay, args=(plain,), daemon=True).start()

    def _relay(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError), plain:
            inner = self._accept_tls.wrap_socket(plain, server_side=True)
            name, tls = self._clients[inner.getpeercert(binary_form=True) or b""]
            host, _, port = self.target.rpartition(":")
            outer = tls.wrap_socket(
                socket.create_connection((host, int(port))), server_hostname=host
            )
            record, answers = bytearray(), bytearray()
            self._streams.append((name, record))
            self._answers.append((name, answers))
            back = threading.Thread(target=_pump, args=(outer, inner, answers), daemon=True)
            back.start()
            _pump(inner, outer, record)
            back.join()


def _pump(source: ssl.SSLSocket, sink: ssl.SSLSocket, record: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            record += data
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def _payload(stream: bytes) -> bytes:
    """The DATA frames of an HTTP/2 stream, joined; other bytes as they are."""
    if not stream.startswith(_PREFACE):
        return stream
    return _data(stream[len(_PREFACE) :])


def _data(stream: bytes) -> bytes:
    at, parts = 0, []
    while at + _FRAME_HEADER <= len(stream):
        length = int.from_bytes(stream[at : at + 3], "big")
        if stream[at + 3] == _DATA:
            parts.append(stream[at + _FRAME_HEADER : at + _FRAME_HEADER + length])
        at += _FRAME_HEADER + length
    return b"".join(parts)
