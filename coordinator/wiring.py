"""Puts the coordinator together, serves, and stops it in order."""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from grpc_health.v1 import health_pb2_grpc

from coordinator.admission import Members, Strangers
from coordinator.config import CoordinatorConfig
from coordinator.enroll_service import EnrollService
from coordinator.figures import Figures
from coordinator.fleet_service import FleetService
from coordinator.health import Health, HealthService
from coordinator.invitations import Invitations
from coordinator.ops_http import OpsServer
from coordinator.orders import Orders
from coordinator.parts import Parts, make_parts, open_keys, open_storage, told
from coordinator.presence import Presence
from coordinator.recurring_service import RecurringService
from coordinator.research_service import ResearchService
from coordinator.scheduler import Scheduler
from coordinator.serving import GrpcServer
from coordinator.store import Store
from coordinator.transfer_service import TransferService
from protos import logs, systemd
from protos.chunk_wire import add_transfer
from protos.v1 import (
    enroll_pb2_grpc,
    fleet_pb2_grpc,
    recurring_pb2_grpc,
    research_pb2_grpc,
)

_LOG = logs.logger("coordinator.main")


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


@contextlib.contextmanager
def serving(config: CoordinatorConfig) -> Iterator[Running]:
    """Wire everything, serve until the block ends, stop in order.

    It stops by first saying that it is not ready, then taking no new call, then letting the open
    ones go on for config.drain_seconds; the monitoring port answers to the end.

    Raises: ConfigError when a port, a file or the folder of the configuration cannot be used.
    """
    with ExitStack() as stack:
        keys = open_keys(stack, config)
        store, artifacts = open_storage(stack, config)
        parts = make_parts(stack, config, keys, store, artifacts)
        scheduler = Scheduler(
            config.data_dir,
            store,
            artifacts,
            parts.engine,
            parts.presence,
            parts.signer.sign,
            fuse_workers=config.fuse_workers,
            worker_folder=keys.worker,
        )
        ops_address = _monitoring(stack, parts)
        enroll = EnrollService(
            Invitations(store.database), config.tls.ca, config.authority, config.certificate_days
        )
        server = _server(parts, enroll)
        presence = parts.presence
        roll = threading.Thread(target=presence.run, args=(store.changed,), name="presence")
        roll.start()
        stack.callback(roll.join)
        parts.health.start()
        stack.callback(_stop, server, scheduler, presence, parts.health, config.drain_seconds)
        with told("listen"):
            port = server.start()
        enroll_address = _enrolment(stack, parts, enroll)
        console_url = _console(stack, parts)
        # Last: participants are served while it comes up.
        parts.engine.start(on_failure=lambda e: store.database.on_fatal(f"no engine: {e!r}"))
        yield Running(
            f"{_host(config.listen)}:{port}",
            parts.engine.public_address,
            ops_address,
            scheduler,
            store,
            enroll_address,
            console_url,
        )


def _monitoring(stack: ExitStack, parts: Parts) -> str:
    """Serve /metrics and the probes until the stack ends; return the address."""
    config = parts.config
    certificates = {"server": config.tls.certificate, "authority": config.tls.ca}
    figures = Figures(parts.store, config.data_dir, certificates, parts.presence.attending)
    with told("ops_listen"):
        ops = OpsServer(config.ops_listen, parts.health, figures.text)
    ops.start()
    stack.callback(ops.stop)
    return ops.address


def _enrolment(stack: ExitStack, parts: Parts, enroll: EnrollService) -> str:
    """Redeem tokens on a port of its own until the stack ends, where one is wanted."""
    listen = parts.config.enroll_listen
    if listen is None:
        return ""
    register = partial(enroll_pb2_grpc.add_EnrollServicer_to_server, enroll)
    tls, note = parts.config.tls.files(), parts.refusals.note
    door = GrpcServer(listen, tls, [register], Strangers(), note)
    with told("enroll_listen"):
        address = f"{_host(listen)}:{door.start()}"
    stack.callback(door.stop)
    return address


def _host(listen: str) -> str:
    return listen.rpartition(":")[0]


def _server(parts: Parts, enroll: EnrollService) -> GrpcServer:
    """The gRPC server with every service, not started."""
    config, store, artifacts, engine = parts.config, parts.store, parts.artifacts, parts.engine
    fleet = FleetService(
        store,
        artifacts,
        engine,
        parts.presence,
        parts.opening,
        parts.signer.receipt,
        engine_advertise=config.engine_advertise or config.reached_at(engine.public_address),
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
            partial(add_transfer, transfer),
            partial(research_pb2_grpc.add_ResearchServicer_to_server, research),
            partial(recurring_pb2_grpc.add_RecurringServicer_to_server, recurring),
            partial(enroll_pb2_grpc.add_EnrollServicer_to_server, enroll),
            partial(health_pb2_grpc.add_HealthServicer_to_server, HealthService(parts.health)),
        ],
        parts.members,
        parts.refusals.note,
    )


def _research(parts: Parts, orders: Orders) -> ResearchService:
    return ResearchService(
        parts.store,
        parts.artifacts,
        parts.signer,
        orders,
        auto_approve=parts.config.approval == "auto",
        attending=parts.presence.attending,
        stopping=parts.health.stopping,
    )


def _console(stack: ExitStack, parts: Parts) -> str:
    """Serve the console until the stack ends, where one is wanted; return its address."""
    config = parts.config.console
    if config is None:
        return ""
    from coordinator.console.serving import Console  # half a second, for those who want it

    with told("console.listen"):
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
