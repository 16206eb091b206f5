"""Program A: `python -m coordinator.main coordinator.toml`. Safe to kill at any line."""

import contextlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from grpc_health.v1 import health_pb2_grpc

from coordinator.admission import Members, Strangers
from coordinator.artifacts import Artifacts, open_artifacts
from coordinator.auditor import Auditor
from coordinator.config import CoordinatorConfig, load_config
from coordinator.engine import Engine, EngineConfig
from coordinator.enroll_service import EnrollService
from coordinator.figures import Figures
from coordinator.fleet_service import FleetService, waited_for
from coordinator.health import Health, HealthService
from coordinator.invitations import Invitations
from coordinator.opening import Opening
from coordinator.ops_http import OpsServer
from coordinator.orders import Orders
from coordinator.presence import Presence
from coordinator.recurring_service import RecurringService
from coordinator.refusals import Refusals
from coordinator.research_service import ResearchService
from coordinator.revocations import Revocations
from coordinator.scheduler import Scheduler
from coordinator.sealed import worker_folder
from coordinator.serving import GrpcServer
from coordinator.signing import Signer, ensure_key
from coordinator.store import Store
from coordinator.store_errors import StoreError
from coordinator.transfer_service import TransferService
from coordinator.upkeep import Upkeep
from protos import logs, systemd
from protos.config import ConfigError
from protos.files import settle
from protos.process import die_with_parent, on_stop_signal
from protos.v1 import (
    enroll_pb2_grpc,
    fleet_pb2_grpc,
    recurring_pb2_grpc,
    research_pb2_grpc,
    transfer_pb2_grpc,
)
from trust.ca import AUTHORITY_KEY
from trust.chain import AuditError
from trust.keys import KeyFileError
from trust.seal_keys import RECIPIENT_FILE

_LOG = logs.logger("coordinator.main")  # also when this file is the program


@dataclass(frozen=True, slots=True)
class Running:
    """A coordinator that serves."""

    address: str
    engine_address: str
    ops_address: str
    scheduler: Scheduler
    store: Store
    enroll_address: str = ""
    """Empty: tokens are not redeemed here."""
    console_url: str = ""
    """Empty: there is no console."""


@dataclass(frozen=True, slots=True)
class _Parts:
    """What the services share."""

    config: CoordinatorConfig
    store: Store
    artifacts: Artifacts
    engine: Engine
    presence: Presence
    health: Health
    members: Members
    signer: Signer
    opening: Opening
    refusals: Refusals
    revocations: Revocations


@contextlib.contextmanager
def serving(config: CoordinatorConfig) -> Iterator[Running]:
    """Wire everything, serve until the block ends, stop in order.

    It stops by first saying that it is not ready, then taking no new call, then letting the open
    ones go on for config.drain_seconds; the monitoring port answers to the end.

    Raises: ConfigError when a port, a file or the folder of the configuration cannot be used.
    """
    with ExitStack() as stack:
        with _told("tls"):
            config.tls.files().read()  # its errors name the file; the libraries' do not
            signing_key = ensure_key(config.tls.key, config.tls.ca)
        worker = worker_folder(config.tls.key)
        opening = Opening(worker, config.tls.ca.with_name(RECIPIENT_FILE))
        stack.callback(opening.stop)
        with _told("tls"):
            opening.start()
        if config.authority is not None:
            with _told("authority"):
                (config.authority / AUTHORITY_KEY).read_bytes()
        with _told("data_dir"):
            settle(config.data_dir)
        with _told("artifacts"):
            artifacts = open_artifacts(config.data_dir, config.artifacts)
        with _told("store"):
            store = Store(config.store_url(), lead=True, backups=config.data_dir)
        stack.callback(store.close)
        with _told("data_dir"):
            auditor = Auditor(store, config.data_dir)
        auditor.start()
        stack.callback(auditor.stop)
        refusals = Refusals(store)
        refusals.start()
        stack.callback(refusals.stop)
        with _told("tls"):
            signer = Signer(store, artifacts, signing_key)
        signer.renew()  # before anybody asks: pivots of an older release have no manifest
        upkeep = Upkeep(
            artifacts, store, config.data_dir / "artifacts" / "scrubbed", renew=signer.renew
        )
        upkeep.start()
        stack.callback(upkeep.stop)
        revocations = Revocations(store.database)
        members = Members(revocations)
        members.refresh()  # before anybody may call
        with _told("engine_listen"):
            engine = _engine(config, members)
            engine.listen()
        stack.callback(engine.stop)
        presence = Presence(lambda round_id: waited_for(store, round_id), wave=config.wave)
        scheduler = Scheduler(
            config.data_dir,
            store,
            artifacts,
            engine,
            presence,
            signer.sign,
            fuse_workers=config.fuse_workers,
            worker_folder=worker,
        )
        health = Health(
            {"database": store.check_writable, "artifacts": artifacts.check_writable},
            beat=lambda: systemd.notify(systemd.WATCHDOG),
        )
        certificates = {"server": config.tls.certificate, "authority": config.tls.ca}
        figures = Figures(store, config.data_dir, certificates, presence.attending)
        with _told("ops_listen"):
            ops = OpsServer(config.ops_listen, health, figures.text)
        ops.start()
        stack.callback(ops.stop)
        enroll = EnrollService(
            Invitations(store.database), config.tls.ca, config.authority, config.certificate_days
        )
        parts = _Parts(
            config,
            store,
            artifacts,
            engine,
            presence,
            health,
            members,
            signer,
            opening,
            refusals,
            revocations,
        )
        server = _server(parts, enroll)
        roll = threading.Thread(target=presence.run, args=(store.changed,), name="presence")
        roll.start()
        stack.callback(roll.join)
        health.start()
        stack.callback(_stop, server, scheduler, presence, health, config.drain_seconds)
        with _told("listen"):
            port = server.start()
        enroll_address = ""
        if config.enroll_listen is not None:
            register = partial(enroll_pb2_grpc.add_EnrollServicer_to_server, enroll)
            door = GrpcServer(
                config.enroll_listen, config.tls.files(), [register], Strangers(), refusals.note
            )
            with _told("enroll_listen"):
                enroll_address = f"{_host(config.enroll_listen)}:{door.start()}"
            stack.callback(door.stop)
        console_url = _console(stack, parts)
        # Last: participants are served while it comes up.
        engine.start(on_failure=lambda e: store.database.on_fatal(f"no engine: {e!r}"))
        address = f"{_host(config.listen)}:{port}"
        yield Running(
            address,
            engine.public_address,
            ops.address,
            scheduler,
            store,
            enroll_address,
            console_url,
        )


def _host(listen: str) -> str:
    return listen.rpartition(":")[0]


def _engine(config: CoordinatorConfig, members: Members) -> Engine:
    host, _, port = config.engine_listen.rpartition(":")
    return Engine(
        EngineConfig(
            state_dir=config.data_dir / "engine",
            public_host=host,
            public_port=int(port),
            ca=config.tls.ca,
            certificate=config.tls.certificate,
            key=config.tls.key,
            refusal=members.refusal,
        )
    )


def _server(parts: _Parts, enroll: EnrollService) -> GrpcServer:
    """The gRPC server with every service, not started."""
    config, store, artifacts, engine = parts.config, parts.store, parts.artifacts, parts.engine
    fleet = FleetService(
        store,
        artifacts,
        engine,
        parts.presence,
        parts.opening,
        parts.signer.receipt,
        engine_advertise=config.engine_advertise,
    )
    transfer = TransferService(artifacts, store, config.max_upload_bytes)
    orders = Orders(config.tls.ca)
    research = _research(parts, orders)
    recurring = RecurringService(store, research.checked, orders)
    return GrpcServer(
        config.listen,
        config.tls.files(),
        [
            partial(fleet_pb2_grpc.add_FleetServicer_to_server, fleet),
            partial(transfer_pb2_grpc.add_TransferServicer_to_server, transfer),
            partial(research_pb2_grpc.add_ResearchServicer_to_server, research),
            partial(recurring_pb2_grpc.add_RecurringServicer_to_server, recurring),
            partial(enroll_pb2_grpc.add_EnrollServicer_to_server, enroll),
            partial(health_pb2_grpc.add_HealthServicer_to_server, HealthService(parts.health)),
        ],
        parts.members,
        parts.refusals.note,
    )


def _research(parts: _Parts, orders: Orders) -> ResearchService:
    return ResearchService(
        parts.store,
        parts.artifacts,
        parts.signer,
        orders,
        auto_approve=parts.config.approval == "auto",
        attending=parts.presence.attending,
        stopping=parts.health.stopping,
    )


def _console(stack: ExitStack, parts: _Parts) -> str:
    """Serve the console until the stack ends, where one is wanted; return its address."""
    config = parts.config.console
    if config is None:
        return ""
    from coordinator.console.serving import Console  # half a second, for those who want it

    with _told("console.listen"):
        console = Console(
            parts.config,
            parts.store,
            parts.artifacts,
            _research(parts, Orders(parts.config.tls.ca)),
            parts.presence.attending,
            Members(parts.revocations),
        )
    console.start()
    stack.callback(console.stop)
    return console.url


def _stop(
    server: GrpcServer, scheduler: Scheduler, presence: Presence, health: Health, drain_s: float
) -> None:
    began = time.monotonic()
    systemd.notify(systemd.STOPPING)
    health.stop()
    _LOG.info("coordinator.stopping", drain_seconds=drain_s)
    drain = threading.Thread(target=server.stop, args=(drain_s,), name="drain")
    drain.start()
    presence.stop()  # who attends is let go at once; the drain is for work
    scheduler.stop()
    drain.join()
    health.join()
    _LOG.info("coordinator.stopped", seconds=round(time.monotonic() - began, 3))


@contextlib.contextmanager
def _told(key: str) -> Iterator[None]:
    """What the system refuses is said as the key of the configuration that asked for it."""
    try:
        yield
    except (OSError, RuntimeError, StoreError, KeyFileError, AuditError) as error:
        raise ConfigError(f"{key}: {error}; correct it in coordinator.toml") from error


def main(argv: list[str]) -> int:
    """Run the coordinator of one coordinator.toml until SIGTERM or Ctrl-C.

    Returns: 0 stopped as asked, 1 ended by a fault (the log tells), 2 not started.
    """
    die_with_parent()
    if len(argv) != 1:
        sys.stderr.write("usage: python -m coordinator.main coordinator.toml\n")
        return 2
    try:
        config = load_config(Path(argv[0]))
        logs.configure("coordinator", level=config.log_level)
        return _run(config)
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except Exception as error:  # noqa: BLE001 - the one catch-all of the program: one line, status 1
        _LOG.critical("coordinator.failed", exc_info=error)
        return 1


def _run(config: CoordinatorConfig) -> int:
    stop = threading.Event()
    on_stop_signal(stop.set)
    faults: list[BaseException] = []
    with serving(config) as running:

        def schedule() -> None:
            try:
                running.scheduler.run()
            except Exception as error:  # noqa: BLE001 - told below; without its loop nothing works
                faults.append(error)
            stop.set()

        def give_up(reason: str) -> None:
            faults.append(RuntimeError(reason))
            stop.set()

        running.store.database.on_fatal = give_up
        ready = {
            "kind": "ready",
            "address": running.address,
            "engine_address": running.engine_address,
            "ops_address": running.ops_address,
        }
        if running.enroll_address:
            ready["enroll_address"] = running.enroll_address
        if running.console_url:
            ready["console_url"] = running.console_url
        sys.stdout.write(json.dumps(ready) + "\n")
        sys.stdout.flush()
        loop = threading.Thread(target=schedule, name="scheduler")
        loop.start()
        systemd.notify(systemd.READY)
        _LOG.info("coordinator.ready", **{k: v for k, v in ready.items() if k != "kind"})
        stop.wait()
    loop.join()
    for fault in faults:
        _LOG.critical("coordinator.failed", exc_info=fault)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
