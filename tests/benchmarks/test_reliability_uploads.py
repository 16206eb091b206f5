"""What the benchmark of cut uploads counts is what the participant's own sender sends."""

import hashlib
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

from benchmarks.reliability_uploads import Spans
from protos.chunks import CHUNK_BYTES, Outgoing
from protos.v1 import transfer_pb2 as pb


def test_what_begins_anew_after_a_cut_is_counted(tmp_path: Path) -> None:
    path, data = tmp_path / "file", b"a" * (3 * CHUNK_BYTES)
    path.write_bytes(data)
    file = Outgoing(path, hashlib.sha256(data).hexdigest(), pb.CONTRIBUTION)
    spans = Spans()

    def send(offset_bytes: int, messages: int) -> None:
        """Begin a Put; the network lets so many of its messages through, the header too."""
        requests = (message for message, _ in file.requests(offset_bytes))
        sent = spans.intercept_stream_stream(
            lambda _details, messages: messages, SimpleNamespace(), requests
        )
        assert list(islice(sent, messages))

    send(0, 3)
    send(CHUNK_BYTES, 3)
    assert spans.all == [(0, 2 * CHUNK_BYTES), (CHUNK_BYTES, 3 * CHUNK_BYTES)]
    assert spans.resent_bytes() == [CHUNK_BYTES]
