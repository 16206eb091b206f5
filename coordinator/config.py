"""coordinator.toml: where the coordinator listens, keeps its state, and who approves rounds."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from protos.config import Address, StrictConfig, TlsConfig, read_toml


class CoordinatorConfig(StrictConfig):
    """Everything in coordinator.toml. Relative paths start at its folder."""

    listen: Address = "127.0.0.1:7443"
    """host:port of the gRPC services, mutual TLS. Port 0 picks a free one."""
    engine_listen: Address = "127.0.0.1:9443"
    """host:port of the engine's public port, mutual TLS."""
    engine_advertise: Address | None = None
    """What participants are told to dial instead, when a proxy or NAT stands before it."""
    data_dir: Path
    """Database, artifacts and job folders."""
    artifacts: str | None = None
    """URL of an object store for complete files (s3://bucket/prefix, gs://…, az://…), whose
    credentials come from the environment; default: below data_dir."""
    approval: Literal["operator", "auto"] = "operator"
    """Who lets a submitted round run."""
    max_upload_bytes: int = Field(default=64 * 2**30, ge=1)
    fuse_workers: int = Field(default=0, ge=0)
    """Training runs side by side in a fusion job; 0: one more than CPU cores."""
    tls: TlsConfig


def load_config(path: Path) -> CoordinatorConfig:
    """Read coordinator.toml.

    Raises: protos.config.ConfigError with file, key and cure.
    """
    config = read_toml(path, CoordinatorConfig)
    here = path.resolve().parent
    return config.model_copy(
        update={"data_dir": here / config.data_dir, "tls": config.tls.below(here)}
    )
