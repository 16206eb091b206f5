"""The engine listens at once, comes up by itself, and says so when it cannot."""

import socket
import threading
import time
from pathlib import Path

import pytest

from coordinator.engine import Engine, EngineConfig, EngineError
from trust import ca


@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    ca.create_authority(tmp_path / "ca", "engine-test")
    request = ca.new_identity(tmp_path / "tls", "coordinator", "coordinator")
    certificate = tmp_path / "tls" / "certificate.pem"
    certificate.write_bytes(
        ca.sign_request(tmp_path / "ca", request, role="coordinator", name="coordinator")
    )
    return EngineConfig(
        state_dir=tmp_path / "engine",
        ca=tmp_path / "ca" / "ca.pem",
        certificate=certificate,
        key=tmp_path / "tls" / "key.pem",
    )


def public_key(folder: Path) -> bytes:
    request = ca.new_identity(folder, "participant", "north")
    signed = ca.sign_request(folder.parent / "ca", request, role="participant", name="north")
    return ca.public_key_bytes(signed)


def test_who_calls_before_it_is_up_waits_for_it(config: EngineConfig, tmp_path: Path) -> None:
    engine = Engine(config)
    engine.listen()
    host, _, port = engine.public_address.partition(":")
    socket.create_connection((host, int(port)), timeout=5).close()
    key, nodes = public_key(tmp_path / "north"), list[int]()
    early = threading.Thread(target=lambda: nodes.append(engine.register("north", key)))
    early.start()
    time.sleep(0.1)
    assert not nodes
    engine.start(on_failure=lambda error: pytest.fail(repr(error)))
    early.join(60)
    engine.stop()
    assert nodes[0] > 0


def test_an_engine_that_cannot_come_up_says_so_to_all(config: EngineConfig) -> None:
    config.state_dir.mkdir()
    (config.state_dir / "flower.sqlite").mkdir()  # where a file is wanted
    engine, failures = Engine(config), list[BaseException]()
    engine.listen()
    engine.start(on_failure=failures.append)
    with pytest.raises(EngineError, match="not up"):
        engine.register("north", b"")
    engine.stop()
    assert failures
    address = engine.public_address.partition(":")
    socket.create_server((address[0], int(address[2]))).close()  # the port is free again


def test_it_stops_also_when_it_never_started(config: EngineConfig) -> None:
    engine = Engine(config)
    engine.stop()
    engine.listen()
    engine.stop()
