"""coordinator.toml: where the coordinator listens, keeps its state, and who approves rounds."""

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from protos.config import Address, StrictConfig, TlsConfig, read_toml


class CoordinatorConfig(StrictConfig):
    """Everything in coordinator.toml. Relative paths start at its folder."""

    listen: Address = "127.0.0.1:7443"
    """host:port of the gRPC services, mutual TLS. Port 0 picks a free one."""
    engine_listen: Address = "127.0.0.1:9443"
    """host:port of the engine's public port, mutual TLS."""
    engine_advertise: Address | None = None
    """What participants are told to dial instead, when a proxy or NAT stands before it."""
    enroll_listen: Address | None = None
    """host:port where join tokens are redeemed; TLS, but callers have no certificate yet. Default:
    nowhere."""
    authority: Path | None = None
    """Folder with the authority's ca.key, for joining and renewing. Default: certificates are
    signed by hand."""
    certificate_days: float = Field(default=30.0, gt=0, le=3650)
    """How long a certificate issued over the wire lasts; it is renewed at half of that."""
    data_dir: Path
    """Database, artifacts and job folders."""
    store: str | None = None
    """Database: postgresql+psycopg://USER@HOST/NAME; default a SQLite file in data_dir."""
    artifacts: str | None = None
    """URL of an object store for complete files (s3://bucket/prefix, gs://…, az://…), whose
    credentials come from the environment; default: below data_dir."""
    approval: Literal["operator", "auto"] = "operator"
    """Who lets a submitted round run."""
    ops_listen: Address = "127.0.0.1:0"
    """host:port of /livez, /readyz and /metrics, plain HTTP: loopback only. Port 0 picks one."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level of the coordinator's own log lines."""
    drain_seconds: float = Field(default=20.0, ge=0, le=25)
    """How long calls may go on when the coordinator stops; the whole stop takes at most 30 s."""
    max_upload_bytes: int = Field(default=64 * 2**30, ge=1)
    """Largest file that anybody may put."""
    fuse_workers: int = Field(default=0, ge=0)
    """Training runs side by side in a fusion job; 0: one more than CPU cores."""
    wave: int = Field(default=64, ge=1)
    """Participants on their way to the engine at once; a larger round comes in waves."""
    tls: TlsConfig

    def store_url(self) -> str:
        """Where the database is, as coordinator/database.py wants it."""
        return self.store or f"sqlite:///{self.data_dir / 'coordinator.sqlite'}"

    @model_validator(mode="after")
    def _issues_where_it_enrolls(self) -> "CoordinatorConfig":
        if self.enroll_listen is not None and self.authority is None:
            raise ValueError(
                "found enroll_listen without authority: name the folder with ca.key as authority, "
                "or leave enroll_listen out"
            )
        return self

    @field_validator("ops_listen")
    @classmethod
    def _loopback(cls, value: str) -> str:
        host = value.rpartition(":")[0]
        if host != "localhost" and not host.startswith("127."):
            raise ValueError(
                f"found {value!r}, wanted 127.0.0.1:port: it asks nobody who they are; "
                "let an agent on this machine read it"
            )
        return value


def load_config(path: Path) -> CoordinatorConfig:
    """Read coordinator.toml.

    Raises: protos.config.ConfigError with file, key and cure.
    """
    config = read_toml(path, CoordinatorConfig)
    here = path.resolve().parent
    return config.model_copy(
        update={
            "data_dir": here / config.data_dir,
            "authority": config.authority and here / config.authority,
            "tls": config.tls.below(here),
        }
    )
