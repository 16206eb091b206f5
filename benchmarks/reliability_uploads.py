"""One upload through a network that cuts it again and again: what is sent twice?

    python benchmarks/reliability_uploads.py --mib 1024 --cuts 50 [--json]

A real coordinator process; the participant's own sender; between them a proxy that resets every
connection after random numbers of bytes. What each stream begins with and how far it came is read
off its messages: the next one begins earlier by what a cut has cost.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np

# Run as a script, this file's own folder comes first and its files pass for packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reliability_light import Identity
from cofuse.demo.federation import Federation
from participant.client import Client
from protos.chunks import sha256_of
from protos.tls import dial
from protos.transfer import WINDOW_BYTES, Transfer
from protos.v1 import transfer_pb2 as pb
from tests.chaos import ChaosProxy

MIB: Final = 2**20


class Spans(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
    """Notes of every Put where it began and how far its messages came, in bytes of the file."""

    def __init__(self) -> None:
        self.all: list[tuple[int, int]] = []

    def intercept_stream_stream(
        self,
        continuation: Callable[..., Any],
        client_call_details: Any,
        request_iterator: Iterator[bytes],
    ) -> Any:
        """Pass the messages on."""
        return continuation(client_call_details, self._noted(request_iterator))

    def resent_bytes(self) -> list[int]:
        """By cut: what had been sent and began anew."""
        return [end - start for (_, end), (start, _) in pairwise(self.all)]

    def _noted(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        at = 0
        for message in messages:
            request = pb.PutRequest.FromString(message)
            if request.HasField("header"):
                at = request.header.offset_bytes
                self.all.append((at, at))
            else:
                at += len(request.chunk.data)
                self.all[-1] = (self.all[-1][0], at)
            yield message


def measure(mib: int, cuts: int, *, seed: int = 0) -> dict[str, Any]:
    """Upload mib MiB over so many cuts; return what was sent twice at the worst.

    A chunk is 4 MiB here: what may be on its way unanswered, in messages of a quarter of that.
    """
    with tempfile.TemporaryDirectory(prefix="cofuse-uploads-") as folder:
        work = Path(folder)
        path, spans = work / "noise", Spans()
        digest = _noise(path, mib, seed)
        mean, dice = mib * MIB // (cuts + 1), random.Random(seed)
        with Federation(work, lambda _who, _message: None) as federation:
            federation.init()
            federation.enrol("a")
            federation.start_coordinator()
            tls = Identity(name="a", home=work / "a").tls
            direct = Client(federation.address, tls)
            direct.join("uploads")
            with ChaosProxy(federation.address) as proxy:
                proxy.cuts = iter([dice.randint(mean // 2, mean) for _ in range(cuts)])
                with dial(proxy.address, tls) as channel:
                    began = time.monotonic()
                    sender = Transfer(grpc.intercept_channel(channel, spans))
                    sender.put(path, digest, pb.CONTRIBUTION)
                    seconds = time.monotonic() - began
                resets, up_bytes = proxy.resets, proxy.up_bytes
            whole = direct.missing_bytes(path, digest) == 0
            direct.close()
    return {
        "upload_cuts": resets,
        "resent_chunks_max": round(max(spans.resent_bytes(), default=0) / WINDOW_BYTES, 2),
        "upload_overhead": round(up_bytes / (mib * MIB) - 1, 4),
        "upload_whole": whole,
        "upload_s": round(seconds, 1),
    }


def _noise(path: Path, mib: int, seed: int) -> str:
    noise = np.random.default_rng(seed)
    with path.open("wb") as file:
        for _ in range(mib):
            file.write(noise.bytes(MIB))
    return sha256_of(path)


def main(argv: Sequence[str] | None = None) -> int:
    """Upload, and print what was sent twice; exit 1 when the file did not arrive."""
    parser = argparse.ArgumentParser(description="An upload that is cut many times.")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, last")
    arguments = parser.parse_args(argv)
    found = measure(arguments.mib, arguments.cuts)
    sys.stderr.write("".join(f"{key}: {value}\n" for key, value in found.items()))
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")
    return int(not found["upload_whole"])


if __name__ == "__main__":
    raise SystemExit(main())
