"""The Transfer service on loopback behind a chaos proxy, and files to send."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from coordinator.artifacts import Artifacts
from coordinator.serving import GrpcServer
from coordinator.store import Store
from coordinator.transfer_service import TransferService
from protos.chunk_wire import add_transfer
from protos.chunks import sha256_of
from protos.tls import TlsFiles, dial
from protos.transfer import Transfer
from tests.chaos import ChaosProxy
from tests.integration.conftest import MakeIdentity

MIB = 1024 * 1024
THREADS = 8


@dataclass(frozen=True)
class Site:
    """A coordinator's Transfer service behind a chaos proxy, and a client of it."""

    proxy: ChaosProxy
    server: GrpcServer
    artifacts: Artifacts
    store: Store
    address: str
    identity: TlsFiles
    client: Callable[..., Transfer]


@pytest.fixture
def start_site(tmp_path: Path, identities: MakeIdentity) -> Iterator[Callable[..., Site]]:
    """Serve with the given idle limit."""
    with ExitStack() as stack:

        def make(idle_s: float = 30.0) -> Site:
            store = Store.at(tmp_path / "db.sqlite")
            artifacts = Artifacts(tmp_path / "artifacts")
            service = TransferService(artifacts, store, 4 * 2**30, idle_s=idle_s)
            register = partial(add_transfer, service)
            files = identities("coordinator", "coordinator")
            server = GrpcServer("127.0.0.1:0", files, [register], idle_s=idle_s)
            address = f"127.0.0.1:{server.start()}"
            stack.callback(server.stop, 0.0)
            proxy = stack.enter_context(ChaosProxy(address))
            identity = identities("participant", "a")

            def client(**settings: float) -> Transfer:
                channel = dial(proxy.address, identity)
                stack.callback(channel.close)
                return Transfer(channel, **settings)  # type: ignore[arg-type]

            return Site(proxy, server, artifacts, store, address, identity, client)

        yield make


def make_file(folder: Path, size_bytes: int) -> tuple[Path, str]:
    """A file of noise, and its sha256."""
    path = folder / "noise"
    with path.open("wb") as file:
        noise = np.random.default_rng(size_bytes)
        for start in range(0, size_bytes, MIB):
            file.write(noise.bytes(min(MIB, size_bytes - start)))
    return path, sha256_of(path)
