"""Chunks add up to the file, whatever the offset, and their digests to its name."""

import hashlib
from pathlib import Path

import pytest

from protos.chunks import CHUNK_BYTES, Outgoing, hash_prefix, sha256_of
from protos.errors import CofuseError
from protos.v1 import transfer_pb2

DATA = bytes(range(251)) * (3 * CHUNK_BYTES // 251)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("offset", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 7, len(DATA)])
def test_chunks_from_any_offset_carry_the_digest_of_all_before_them(
    tmp_path: Path, named: bool, offset: int
) -> None:
    path, name = tmp_path / "file", hashlib.sha256(DATA).hexdigest()
    path.write_bytes(DATA)
    if named:
        assert sha256_of(path) == name
    sent = Outgoing(path, name, transfer_pb2.PIVOT).requests(offset)
    (header, _), *chunks = [(transfer_pb2.PutRequest.FromString(raw), n) for raw, n in sent]
    assert header.header.prefix_sha256 == hashlib.sha256(DATA[:offset]).digest()
    at = offset
    for request, length in chunks:
        data, end = request.chunk.data, at + length
        assert data == DATA[at:end]
        assert request.chunk.sha256 == hashlib.sha256(DATA[:end]).digest()
        at = end
    assert at == len(DATA)


def test_a_file_that_is_not_what_it_is_called_is_not_sent_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    requests, sent = Outgoing(path, "0" * 64, transfer_pb2.PIVOT).requests(0), []
    with pytest.raises(CofuseError, match="changed after it was named"):
        sent.extend(requests)
    assert sum(length for _, length in sent) < len(DATA)


@pytest.mark.parametrize("length", [0, 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(DATA)])
def test_the_hash_of_a_prefix_is_that_of_its_bytes(tmp_path: Path, length: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    assert hash_prefix(path, length).digest() == hashlib.sha256(DATA[:length]).digest()
