"""How fast a file goes in and out over mutual TLS, against a bare gRPC stream of the same run.

    python benchmarks/transfer.py [--mib 1024] [--turns 3] [--json]

The coordinator's Transfer service runs in a process of its own, on loopback. Up: a file that has
been named (hashed) before, from Stat until the answer that says it is durable; every chunk is
checked, written and synced. Down: the whole file, checked, written and synced. Raw: as many bytes
in chunks of the same size through a stream that is read and thrown away: no hash, no disk, no
protobuf; its server is another process, so that its buffers do not hide what ours needs. Durable:
the same bare stream, but its reader takes the sha256 and brings the bytes to disk, which is the
least that any promise to have a file costs. They take turns; figures are medians. Growth is of the
service's resident memory over what it had before its first big file. `cpu_s_per_gb`: seconds of a
core that both sides spend on a gigabyte. Where two cores carry both sides, no ratio can be above
that of these costs; and they change little on a machine that does other things too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final

# Run as a script, this file's own folder comes first on the path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc
import numpy as np
import psutil

from coordinator.artifacts import Artifacts
from coordinator.serving import GrpcServer
from coordinator.store import Store
from coordinator.transfer_service import TransferService
from protos.chunk_wire import add_transfer
from protos.chunks import CHUNK_BYTES, sha256_of
from protos.messages import FileRef
from protos.tls import SERVER_OPTIONS, TlsFiles, dial, server_credentials
from protos.transfer import Transfer
from protos.v1 import transfer_pb2
from trust.ca import Role, create_authority, new_identity, sign_request

RAW: Final = "/benchmark/Raw"
DURABLE: Final = "/benchmark/Durable"
MIB: Final = 1024 * 1024


class RawStream(grpc.GenericRpcHandler):
    """Counts bytes and throws them away, or writes them to a file of its own."""

    def __init__(self, home: Path) -> None:
        self._file = home / "durable"

    def service(self, details: Any) -> Any:
        """Handle RAW and DURABLE."""
        handlers: dict[str, Callable[[Iterator[bytes], Any], bytes]] = {
            RAW: lambda chunks, _: b"%d" % sum(len(chunk) for chunk in chunks),
            DURABLE: lambda chunks, _: self._keep(chunks),
        }
        if details.method not in handlers:
            return None
        return grpc.stream_unary_rpc_method_handler(handlers[details.method])

    def _keep(self, chunks: Iterator[bytes]) -> bytes:
        digest, length = hashlib.sha256(), 0
        self._file.unlink(missing_ok=True)
        with self._file.open("wb", buffering=0) as file:
            for chunk in chunks:
                digest.update(chunk)
                length += file.write(chunk)
            os.fsync(file.fileno())
        return b"%d" % length


def identity(home: Path, role: Role, name: str) -> TlsFiles:
    """A certificate of the benchmark's authority, made at its first use."""
    folder = home / role
    files = TlsFiles(
        ca=home / "ca" / "ca.pem", certificate=folder / "certificate.pem", key=folder / "key.pem"
    )
    if not files.certificate.exists():
        request = new_identity(folder, role, name)
        files.certificate.write_bytes(sign_request(home / "ca", request, role=role, name=name))
    return files


def serve(home: Path, raw_only: bool) -> None:
    """Print the port and serve until stdin ends."""
    files = identity(home, "coordinator", "coordinator")
    if raw_only:
        bare = grpc.server(ThreadPoolExecutor(8), options=SERVER_OPTIONS)
        bare.add_generic_rpc_handlers((RawStream(home),))
        print(bare.add_secure_port("127.0.0.1:0", server_credentials(files)), flush=True)
        bare.start()
    else:
        service = TransferService(
            Artifacts(home / "artifacts"), Store.at(home / "db.sqlite"), 2**40
        )
        door = GrpcServer("127.0.0.1:0", files, [partial(add_transfer, service)])
        print(door.start(), flush=True)
    sys.stdin.read()


class Server:
    """A process that serves, and a channel to it."""

    def __init__(self, home: Path, caller: TlsFiles, kind: str) -> None:
        command = [sys.executable, __file__, "--serve", str(home), "--kind", kind]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        self.channel = dial(f"127.0.0.1:{self._process.stdout.readline().strip()}", caller)
        self.pid = self._process.pid

    def close(self) -> None:
        """End both."""
        self.channel.close()
        self._process.communicate("")


def noise(path: Path, mib: int, seed: int) -> str:
    """Write a file of random bytes; return its sha256."""
    dice = np.random.default_rng(seed)
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(dice.bytes(MIB))
    return sha256_of(path)


def raw(channel: grpc.Channel, mib: int, method: str = RAW) -> None:
    """Send that much through a bare stream."""
    chunk = bytes(CHUNK_BYTES)
    chunks: Iterator[bytes] = (chunk for _ in range(mib * MIB // CHUNK_BYTES))
    assert int(channel.stream_unary(method)(chunks)) == mib * MIB


def fresh(transfer: Transfer, file: FileRef, home: Path) -> None:
    """Download a file that is not there."""
    (home / file.name).unlink(missing_ok=True)
    transfer.get(file, home)


class Watch:
    """The highest resident memory of a process while the block runs."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._stop = threading.Event()
        self.peak_bytes = 0

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            self.peak_bytes = max(self.peak_bytes, self._process.memory_info().rss)


def cpu_s(*pids: int) -> float:
    """Seconds of a core that processes have spent so far."""
    spent = (psutil.Process(pid).cpu_times() for pid in pids)
    return sum(each.user + each.system for each in spent)


def timed(work: Callable[[], object], server: int) -> tuple[float, float]:
    """Seconds that it takes, and seconds of a core that we and the server spend."""
    begun_s, spent_s = time.perf_counter(), cpu_s(os.getpid(), server)
    work()
    return time.perf_counter() - begun_s, cpu_s(os.getpid(), server) - spent_s


def measure(home: Path, mib: int, turns: int) -> dict[str, float]:
    """All figures; see above."""
    create_authority(home / "ca", "benchmark")
    identity(home, "coordinator", "coordinator")
    operator = identity(home, "operator", "a")
    bare, ours = (Server(home, operator, kind) for kind in ("raw", "transfer"))
    transfer = Transfer(ours.channel)
    seconds: dict[str, list[float]] = {"raw": [], "durable": [], "up": [], "down": []}
    spent: dict[str, list[float]] = {name: [] for name in seconds}
    path = home / "noise"
    small = FileRef(name="small", sha256=noise(path, 8, 0), size_bytes=8 * MIB)
    transfer.put(path, small.sha256, transfer_pb2.PIVOT)  # imports, buffers, threads
    transfer.get(small, home)
    raw(bare.channel, 64)
    before = psutil.Process(ours.pid).memory_info().rss
    with Watch(ours.pid) as memory:
        for turn in range(turns):
            file = FileRef(name="got", sha256=noise(path, mib, turn + 1), size_bytes=mib * MIB)
            for name, work in {
                "raw": lambda: raw(bare.channel, mib),
                "durable": lambda: raw(bare.channel, mib, DURABLE),
                "up": lambda file=file: transfer.put(path, file.sha256, transfer_pb2.PIVOT),
                "down": lambda file=file: fresh(transfer, file, home),
            }.items():
                server = bare if name in ("raw", "durable") else ours
                took_s, cost_s = timed(work, server.pid)
                seconds[name].append(took_s)
                spent[name].append(cost_s)
    for server in (bare, ours):
        server.close()
    gigabytes = mib * MIB / 1e9
    rate = {name: 1e3 * gigabytes / statistics.median(s) for name, s in seconds.items()}
    cost = {name: statistics.median(s) / gigabytes for name, s in spent.items()}

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds["up"], strict=True))

    return {
        "ratio_raw": ratio("raw"),
        "ratio_durable": ratio("durable"),
        "rss_growth_mib": (memory.peak_bytes - before) / MIB,
        "mb_per_s": rate["up"],
        "down_mb_per_s": rate["down"],
        "raw_mb_per_s": rate["raw"],
        "durable_mb_per_s": rate["durable"],
        **{f"{name}_cpu_s_per_gb": each for name, each in cost.items()},
        "mib": mib,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="transfer", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve, raw_only=arguments.kind == "raw")
        return
    with tempfile.TemporaryDirectory() as home:
        found = measure(Path(home), arguments.mib, arguments.turns)
    if not arguments.json:
        for name, value in found.items():
            print(f"{name:>20} {value:10.3f}")
    print(json.dumps({name: round(value, 3) for name, value in found.items()}))


if __name__ == "__main__":
    main()
