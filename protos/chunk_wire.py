"""Chunks as the bytes of their messages, written with one copy.

The protobuf library copies a chunk into its arena and then into a buffer that it grows by doubling:
1.4 s of a core for each gigabyte in chunks of 1 MiB: as much as hash, TLS and disk.
The bytes are the library's own (tests/protos/test_chunk_wire.py), so either side may use it.
Source: protobuf.dev/programming-guides/encoding.
"""

from typing import Any, Final

import grpc

from protos.v1 import transfer_pb2 as pb
from protos.v1 import transfer_pb2_grpc

PUT: Final = "/cofuse.v1.Transfer/Put"
_SERVICE: Final = "cofuse.v1.Transfer"


def _tag(field: int) -> bytes:
    """What begins a field of bytes or of a message."""
    return bytes([field << 3 | 2])


_DATA: Final = _tag(pb.Chunk.DATA_FIELD_NUMBER)
_SHA256: Final = _tag(pb.Chunk.SHA256_FIELD_NUMBER)
_CHUNK: Final = _tag(pb.PutRequest.CHUNK_FIELD_NUMBER)


def chunk_message(data: bytes, sha256: bytes) -> bytes:
    """The bytes of a Chunk. Args: data, sha256: neither empty."""
    return b"".join(_fields(data, sha256))


def put_message(data: bytes, sha256: bytes) -> bytes:
    """The bytes of a PutRequest with that chunk. Args: as chunk_message."""
    fields = _fields(data, sha256)
    return b"".join((_CHUNK, _varint(sum(map(len, fields))), *fields))


def put_stream(channel: grpc.Channel) -> Any:
    """Transfer.Put, which takes its messages as bytes."""
    return channel.stream_stream(PUT, None, pb.StatReply.FromString)


def add_transfer(servicer: transfer_pb2_grpc.TransferServicer, server: grpc.Server) -> None:
    """Let a server answer Transfer; a Get answers with the bytes of its messages."""
    handlers = {
        "Stat": grpc.unary_unary_rpc_method_handler(
            servicer.Stat, pb.StatRequest.FromString, pb.StatReply.SerializeToString
        ),
        "Put": grpc.stream_stream_rpc_method_handler(
            servicer.Put, pb.PutRequest.FromString, pb.StatReply.SerializeToString
        ),
        "Get": grpc.unary_stream_rpc_method_handler(servicer.Get, pb.GetRequest.FromString),
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_SERVICE, handlers),))


def _fields(data: bytes, sha256: bytes) -> tuple[bytes, ...]:
    return _DATA, _varint(len(data)), data, _SHA256, _varint(len(sha256)), sha256


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes(out) + bytes([number])
