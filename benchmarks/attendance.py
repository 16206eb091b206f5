"""What idle participants cost: CPU, memory and answer times of a coordinator that N attend.

    python benchmarks/attendance.py [--participants 100 300 1000] [--seconds 30] [--json]

The coordinator is a process of its own, over mutual TLS on loopback; each participant has its own
certificate and connection and beats every ten seconds. Meanwhile one of them names, four times a
second, a round that nobody waits for: the time until it is told so goes through everything that a
cancel goes through. `missed` counts those who are no longer there at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first and this file passes for a package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc
import psutil

from protos.config import toml_text
from protos.process import end, spawn
from protos.tls import OPTIONS
from protos.v1 import fleet_pb2 as pb
from protos.v1 import fleet_pb2_grpc
from trust.ca import create_authority, new_identity, sign_request

PROBES_PER_S: Final = 4
SETTLE_S: Final = 5.0
JOINING: Final = 50
"""Joins at once: a herd that has lost its coordinator spreads itself too."""


class Crowd:
    """Participants as cheap as a test can make them: one coroutine each."""

    def __init__(self, address: str, identities: list[tuple[bytes, bytes, bytes]]) -> None:
        self.address = address
        self.identities = identities
        self.answers_s: list[float] = []
        self.ended = 0
        self._ready = asyncio.Semaphore(JOINING)
        self._here = 0
        self._all = asyncio.Event()

    async def attend(self, seconds: float) -> None:
        """Bring everybody in, then stay for so long."""
        probe = asyncio.create_task(self._probe(self.identities[0]))
        rest = [asyncio.create_task(self._one(identity)) for identity in self.identities[1:]]
        await self._all.wait()
        await asyncio.sleep(seconds)
        for task in (probe, *rest):
            task.cancel()
        await asyncio.gather(probe, *rest, return_exceptions=True)

    async def _one(self, identity: tuple[bytes, bytes, bytes]) -> None:
        async with self._dial(identity) as channel:
            stub = fleet_pb2_grpc.FleetStub(channel)
            async with self._ready:
                await stub.Join(pb.JoinRequest())
                call = stub.Attend(_beats())
                await call.read()
            self._arrived()
            await call.read()
            self.ended += 1

    async def _probe(self, identity: tuple[bytes, bytes, bytes]) -> None:
        async with self._dial(identity) as channel:
            stub = fleet_pb2_grpc.FleetStub(channel)
            await stub.Join(pb.JoinRequest())
            call = stub.Attend()
            await call.write(pb.Beat())
            await call.read()
            self._arrived()
            while True:
                await asyncio.sleep(1 / PROBES_PER_S)
                began = time.perf_counter()
                await call.write(pb.Beat(working_rounds=["rnd-999999"]))
                while not (await call.read()).ended_rounds:
                    pass
                if self._all.is_set():
                    self.answers_s.append(time.perf_counter() - began)
                await call.write(pb.Beat())

    def _arrived(self) -> None:
        self._here += 1
        if self._here == len(self.identities):
            self._all.set()

    def _dial(self, identity: tuple[bytes, bytes, bytes]) -> grpc.aio.Channel:
        ca, certificate, key = identity
        credentials = grpc.ssl_channel_credentials(ca, key, certificate)
        # A pool of its own: else all would share one connection, under one certificate.
        options = (*OPTIONS, ("grpc.use_local_subchannel_pool", 1))
        return grpc.aio.secure_channel(self.address, credentials, options=options)


async def _beats() -> AsyncIterator[pb.Beat]:
    while True:
        yield pb.Beat(software_version="bench", clock_unix_ms=time.time_ns() // 1_000_000)
        await asyncio.sleep(10)


def measure(count: int, seconds: float, folder: Path) -> dict[str, float]:
    """Run one crowd against a fresh coordinator."""
    authority = folder / "ca"
    create_authority(authority, "bench")
    identities = [_identity(folder, "participant", f"p{n}") for n in range(count)]
    _identity(folder, "coordinator", "hub")
    tls = {"ca": "ca/ca.pem", "certificate": "hub/certificate.pem", "key": "hub/key.pem"}
    settings = {"listen": "127.0.0.1:0", "engine_listen": "127.0.0.1:0", "data_dir": "data"}
    (folder / "coordinator.toml").write_text(toml_text({**settings, "tls": tls}), encoding="utf-8")
    hub = spawn("coordinator.main", [str(folder / "coordinator.toml")])
    try:
        assert hub.stdout is not None
        address = json.loads(hub.stdout.readline())["address"]
        return asyncio.run(_watch(psutil.Process(hub.pid), Crowd(address, identities), seconds))
    finally:
        end(hub)


async def _watch(hub: psutil.Process, crowd: Crowd, seconds: float) -> dict[str, float]:
    began, idle_mib = time.monotonic(), hub.memory_info().rss / 2**20
    attending = asyncio.create_task(crowd.attend(seconds + SETTLE_S))
    await asyncio.wait(
        {attending, asyncio.create_task(crowd._all.wait())}, return_when="FIRST_COMPLETED"
    )
    joined_s = time.monotonic() - began
    await asyncio.sleep(SETTLE_S)
    before, at = hub.cpu_times(), time.monotonic()
    await asyncio.sleep(seconds - 1)
    after, wall_s = hub.cpu_times(), time.monotonic() - at
    rss_mib, threads = hub.memory_info().rss / 2**20, hub.num_threads()
    await attending
    used_s = after.user + after.system - before.user - before.system
    return {
        "cpu_cores": round(used_s / wall_s, 3),
        "p99_ms": round(1000 * statistics.quantiles(crowd.answers_s, n=100)[98], 1),
        "p50_ms": round(1000 * statistics.median(crowd.answers_s), 1),
        "missed": crowd.ended,
        "joined_s": round(joined_s, 1),
        "rss_mib": round(rss_mib, 1),
        "rss_growth_mib": round(rss_mib - idle_mib, 1),
        "threads": threads,
    }


def _identity(folder: Path, role: Any, name: str) -> tuple[bytes, bytes, bytes]:
    home = folder / name
    request = new_identity(home, role, name)
    certificate = sign_request(folder / "ca", request, role=role, name=name)
    (home / "certificate.pem").write_bytes(certificate)
    return (folder / "ca" / "ca.pem").read_bytes(), certificate, (home / "key.pem").read_bytes()


def main() -> int:
    """Measure each size and print it; --json prints one object last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--participants", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    found = {}
    for count in asked.participants:
        with tempfile.TemporaryDirectory() as folder:
            found[str(count)] = measure(count, asked.seconds, Path(folder))
        print(count, found[str(count)], file=sys.stderr)
    if asked.json:
        print(json.dumps({"participants": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
