"""Mutual TLS from three paths, and the channel settings both sides share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from protos.chunks import MAX_GRPC_BYTES

OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_GRPC_BYTES),
    ("grpc.max_send_message_length", MAX_GRPC_BYTES),
    # Identity alone: model files do not shrink, and a compressed message could unpack to more
    # memory than it says.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_metadata_size", 16 * 1024),
    # A peer that is gone without a goodbye is noticed within a minute. Not sooner: on a slow link
    # a ping stands in line behind the chunk on its way.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 30_000),
    ("grpc.http2.max_pings_without_data", 0),
)
CLIENT_OPTIONS: Final = (
    *OPTIONS,
    # HTTPS_PROXY and NO_PROXY of the environment: TLS goes through the proxy's CONNECT unopened.
    ("grpc.enable_http_proxy", 1),
    # A coordinator that comes back is found within seconds; gRPC alone waits up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
)
SERVER_OPTIONS: Final = (
    *OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
    ("grpc.so_reuseport", 0),
    # Strangers and slow loris: who has not shown a certificate by then is hung up on.
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_concurrent_streams", 32),
    # Each hour a connection is made anew, so a revoked certificate does not live on in an old
    # one. What is under way has ten minutes; a transfer that takes longer goes on in a new one.
    ("grpc.max_connection_age_ms", 3_600_000),
    ("grpc.max_connection_age_grace_ms", 600_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsFiles:
    """PEM files of one side."""

    ca: Path
    """The authority both sides trust."""
    certificate: Path
    key: Path

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Contents of ca, certificate and key."""
        return self.ca.read_bytes(), self.certificate.read_bytes(), self.key.read_bytes()


_REASONS: Final = (
    (
        "Hostname Verification",
        "the certificate there is not for this name: dial one that it has (its operator's --host; "
        "cofuse coordinator certify gives it others)",
    ),
    (
        "Method not found",
        "another port of the coordinator answers there: dial the one of its `listen`, usually 7443",
    ),
)
"""What gRPC says, and what it means for who dialled."""


def reason(details: str | None) -> str:
    """Why a call found nobody: gRPC's words, or better ones. Args: details: of its RpcError."""
    said = details or "no reason given"
    return next((words for sign, words in _REASONS if sign in said), said)


def dial(address: str, files: TlsFiles) -> grpc.Channel:
    """Open a channel to host:port that shows our certificate and checks theirs."""
    ca, certificate, key = files.read()
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    return grpc.secure_channel(address, credentials, options=CLIENT_OPTIONS)


def server_credentials(files: TlsFiles, *, mutual: bool = True) -> grpc.ServerCredentials:
    """Show our certificate and, when mutual, demand one of the same authority."""
    ca, certificate, key = files.read()
    pair = [(key, certificate)]
    if not mutual:
        return grpc.ssl_server_credentials(pair)
    return grpc.ssl_server_credentials(pair, ca, require_client_auth=True)
