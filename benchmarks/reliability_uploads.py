"""One upload through a network that cuts it again and again: what is sent twice?

    python benchmarks/reliability_uploads.py --mib 1024 --cuts 50 [--json]

A real coordinator process; the participant's own client; between them a proxy that resets every
connection after random numbers of bytes. Before each new connection carries anything, the
coordinator is asked, past the proxy, how much it has: what was sent and is not there goes again.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np

# Run as a script, this file's own folder comes first and its files pass for packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.chaos import ChaosProxy

from benchmarks.reliability_light import Identity
from cofuse.demo.federation import Federation
from participant.client import Client
from protos.chunks import CHUNK_BYTES, sha256_of

MIB: Final = 2**20


def measure(mib: int, cuts: int, *, seed: int = 0) -> dict[str, Any]:
    """Upload mib MiB over so many cuts; return how many chunks were sent twice at the worst."""
    with tempfile.TemporaryDirectory(prefix="cofuse-uploads-") as folder:
        work = Path(folder)
        path, size_bytes = work / "noise", mib * MIB
        noise = np.random.default_rng(seed)
        with path.open("wb") as file:
            for _ in range(mib):
                file.write(noise.bytes(MIB))
        digest = sha256_of(path)
        with Federation(work, lambda _who, _message: None) as federation:
            federation.init()
            federation.enrol("a")
            federation.start_coordinator()
            tls = Identity(name="a", home=work / "a").tls
            direct = Client(federation.address, tls)
            with ChaosProxy(federation.address) as proxy:
                through = Client(proxy.address, tls)
                direct.join("uploads")
                marks: list[tuple[int, int]] = []

                def places() -> Iterator[int]:
                    """Asked for the first byte of each connection, and answers when it ends."""
                    mean, dice = size_bytes // (cuts + 1), random.Random(seed)
                    for _ in range(cuts):
                        mark()
                        yield dice.randint(mean // 2, mean)
                    mark()

                def mark() -> None:
                    here = size_bytes - direct.missing_bytes(path, digest)
                    marks.append((proxy.up_bytes, here))

                proxy.cuts = places()
                began = time.monotonic()
                through.put(path, digest)
                seconds = time.monotonic() - began
                resets, sent_bytes = proxy.resets, proxy.up_bytes
                whole = direct.missing_bytes(path, digest) == 0
                through.close()
            direct.close()
    again = [
        (sent - sent_before) - (here - here_before)
        for (sent_before, here_before), (sent, here) in pairwise(marks)
    ]
    return {
        "upload_cuts": resets,
        "resent_chunks_max": round(max(again, default=0) / CHUNK_BYTES, 2),
        "resent_share": round(sent_bytes / size_bytes - 1, 4),
        "upload_whole": whole,
        "upload_s": round(seconds, 1),
    }


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
