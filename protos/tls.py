"""Mutual TLS from three paths, and the channel settings both sides share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc

from protos.chunks import MAX_GRPC_BYTES

OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_GRPC_BYTES),
    ("grpc.max_send_message_length", MAX_GRPC_BYTES),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.enable_http_proxy", 1),
)
SERVER_OPTIONS: Final = (
    *OPTIONS,
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.so_reuseport", 0),
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


def dial(address: str, files: TlsFiles) -> grpc.Channel:
    """Open a channel to host:port that shows our certificate and checks theirs."""
    ca, certificate, key = files.read()
    credentials = grpc.ssl_channel_credentials(ca, key, certificate)
    return grpc.secure_channel(address, credentials, options=OPTIONS)


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """Demand a client certificate of the same authority."""
    ca, certificate, key = files.read()
    return grpc.ssl_server_credentials([(key, certificate)], ca, require_client_auth=True)
