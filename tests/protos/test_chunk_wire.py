"""The chunks that we write ourselves are, byte for byte, those of the protobuf library."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.chunk_wire import PUT, chunk_message, put_message
from protos.chunks import CHUNK_BYTES
from protos.v1 import transfer_pb2 as pb

DIGEST = bytes(range(32))


def library(data: bytes) -> tuple[bytes, bytes]:
    """A Chunk, and a PutRequest with it."""
    request = pb.PutRequest(chunk=pb.Chunk(data=data, sha256=DIGEST))
    return request.chunk.SerializeToString(), request.SerializeToString()


@given(st.binary(min_size=1, max_size=300))
def test_small_chunks_are_the_librarys(data: bytes) -> None:
    assert (chunk_message(data, DIGEST), put_message(data, DIGEST)) == library(data)


@pytest.mark.parametrize("length", [1, 93, 94, 127, 128, 2**14, 2**21 - 1, 2**21, CHUNK_BYTES])
def test_lengths_at_which_a_number_takes_another_byte(length: int) -> None:
    data = b"x" * length
    assert (chunk_message(data, DIGEST), put_message(data, DIGEST)) == library(data)


def test_the_name_of_the_call_is_the_protos() -> None:
    service = pb.DESCRIPTOR.services_by_name["Transfer"]
    assert f"/{service.full_name}/{service.methods_by_name['Put'].name}" == PUT
