"""A client waits for a coordinator that is away, and stops waiting when it is told to."""

import socket
import threading
import time
from pathlib import Path

import pytest

from participant.client import Client, Stopped
from protos.tls import TlsFiles
from trust.ca import create_authority, new_identity, sign_request


def test_a_client_that_is_told_to_stop_does_not_wait_for_the_coordinator(tmp_path: Path) -> None:
    create_authority(tmp_path / "ca", "test")
    request = new_identity(tmp_path, "participant", "a")
    pem = sign_request(tmp_path / "ca", request, role="participant", name="a")
    (tmp_path / "certificate.pem").write_bytes(pem)
    files = TlsFiles(
        ca=tmp_path / "ca" / "ca.pem",
        certificate=tmp_path / "certificate.pem",
        key=tmp_path / "key.pem",
    )
    with socket.socket() as nobody:  # bound and not listening: every dial is refused
        nobody.bind(("127.0.0.1", 0))
        stop = threading.Event()
        client = Client(f"127.0.0.1:{nobody.getsockname()[1]}", files, stop)
        threading.Timer(0.5, stop.set).start()
        start = time.monotonic()
        with pytest.raises(Stopped):
            client.join("test")
        assert time.monotonic() - start < 30
        client.close()
