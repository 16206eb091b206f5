"""Program A: `python -m coordinator.main coordinator.toml`. Safe to kill at any line."""

import contextlib
import json
import logging
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from coordinator.artifacts import Artifacts
from coordinator.config import CoordinatorConfig, load_config
from coordinator.engine import Engine, EngineConfig
from coordinator.fleet_service import FleetService, waited_for
from coordinator.presence import Presence
from coordinator.research_service import ResearchService
from coordinator.scheduler import Scheduler
from coordinator.serving import GrpcServer
from coordinator.store import Store
from coordinator.transfer_service import TransferService
from protos.config import ConfigError
from protos.process import die_with_parent, on_stop_signal
from protos.v1 import fleet_pb2_grpc, research_pb2_grpc, transfer_pb2_grpc


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
    artifacts = Artifacts(config.data_dir / "artifacts")
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
    presence = Presence(lambda round_id: waited_for(store, round_id), wave=config.wave)
    scheduler = Scheduler(
        config.data_dir, store, artifacts, engine, presence, fuse_workers=config.fuse_workers
    )
    fleet = FleetService(
        store, artifacts, engine, presence, engine_advertise=config.engine_advertise
    )
    transfer = TransferService(artifacts, store, config.max_upload_bytes)
    research = ResearchService(
        store,
        artifacts,
        auto_approve=config.approval == "auto",
        online=lambda: _online(store, presence),
    )
    server = GrpcServer(
        config.listen,
        config.tls.files(),
        [
            partial(fleet_pb2_grpc.add_FleetServicer_to_server, fleet),
            partial(transfer_pb2_grpc.add_TransferServicer_to_server, transfer),
            partial(research_pb2_grpc.add_ResearchServicer_to_server, research),
        ],
    )
    roll = threading.Thread(target=presence.run, args=(store.changed,), name="presence")
    roll.start()
    bound = server.start()
    try:
        address = f"{config.listen.rpartition(':')[0]}:{bound}"
        yield Running(address, engine.public_address, scheduler)
    finally:
        scheduler.stop()
        server.stop()
        presence.stop()
        roll.join()
        engine.stop()


def _online(store: Store, presence: Presence) -> set[int]:
    """Node ids of the participants that attend."""
    here = presence.attending()
    return {row.node_id for name, row in store.participants().items() if name in here}


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
