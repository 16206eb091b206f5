"""Program A: `python -m coordinator.main coordinator.toml`. Safe to kill at any line."""

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from coordinator.access import RoleInterceptor
from coordinator.artifacts import Artifacts
from coordinator.config import CoordinatorConfig, load_config
from coordinator.engine import Engine, EngineConfig
from coordinator.fleet_service import FleetService
from coordinator.research_service import ResearchService
from coordinator.scheduler import Scheduler
from coordinator.store import Store
from coordinator.transfer_service import TransferService
from coordinator.upkeep import Upkeep
from protos.config import ConfigError
from protos.process import die_with_parent, on_stop_signal
from protos.tls import SERVER_OPTIONS, server_credentials
from protos.v1 import fleet_pb2_grpc, research_pb2_grpc, transfer_pb2_grpc

_RPC_THREADS: Final = 64
"""A watcher holds one while it watches."""


@dataclass(frozen=True, slots=True)
class Running:
    """A coordinator that serves."""

    address: str
    engine_address: str
    scheduler: Scheduler


@contextlib.contextmanager
def serving(config: CoordinatorConfig) -> Iterator[Running]:
    """Wire everything, serve until the block ends, stop in order."""
    config.data_dir.mkdir(parents=True, exist_ok=True)
    store = Store.at(config.data_dir / "coordinator.sqlite")
    artifacts = open_artifacts(config)
    upkeep = Upkeep(artifacts, store, config.data_dir / "artifacts" / "scrubbed")
    upkeep.start()
    host, _, port = config.engine_listen.rpartition(":")
    engine = Engine(
        EngineConfig(
            state_dir=config.data_dir / "engine",
            public_host=host,
            public_port=int(port),
            ca=config.tls.ca,
            certificate=config.tls.certificate,
            key=config.tls.key,
        )
    )
    engine.start()
    scheduler = Scheduler(
        config.data_dir, store, artifacts, engine, fuse_workers=config.fuse_workers
    )
    server = grpc.server(
        ThreadPoolExecutor(_RPC_THREADS, thread_name_prefix="rpc"),
        interceptors=[RoleInterceptor()],
        options=SERVER_OPTIONS,
    )
    fleet = FleetService(store, artifacts, engine, engine_advertise=config.engine_advertise)
    fleet_pb2_grpc.add_FleetServicer_to_server(fleet, server)
    transfer_pb2_grpc.add_TransferServicer_to_server(
        TransferService(artifacts, store, config.max_upload_bytes), server
    )
    research = ResearchService(
        store, artifacts, auto_approve=config.approval == "auto", online=engine.online
    )
    research_pb2_grpc.add_ResearchServicer_to_server(research, server)
    bound = server.add_secure_port(config.listen, server_credentials(config.tls.files()))
    server.start()
    try:
        address = f"{config.listen.rpartition(':')[0]}:{bound}"
        yield Running(address, engine.public_address, scheduler)
    finally:
        scheduler.stop()
        server.stop(grace=1).wait()
        upkeep.stop()
        engine.stop()


def open_artifacts(config: CoordinatorConfig) -> Artifacts:
    """The artifact store of a coordinator.toml. Raises: ConfigError."""
    root = config.data_dir / "artifacts"
    if config.artifacts is None:
        return Artifacts(root)
    try:
        from coordinator.object_store import ObjectStore
    except ImportError as error:
        raise ConfigError(
            f"artifacts: {config.artifacts} needs obstore; install cofuse[s3]"
        ) from error
    return Artifacts(root, ObjectStore(config.artifacts, root / "cache"))


def main(argv: list[str]) -> int:
    """Run the coordinator of one coordinator.toml until SIGTERM or Ctrl-C."""
    die_with_parent()
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s")
    if len(argv) != 1:
        sys.stderr.write("usage: python -m coordinator.main coordinator.toml\n")
        return 2
    try:
        config = load_config(Path(argv[0]))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    stop = threading.Event()
    on_stop_signal(stop.set)
    with serving(config) as running:
        ready = {
            "kind": "ready",
            "address": running.address,
            "engine_address": running.engine_address,
        }
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        loop = threading.Thread(target=running.scheduler.run, name="scheduler")
        loop.start()
        stop.wait()
        running.scheduler.stop()
        loop.join()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
