"""coordinator.toml: where the coordinator listens, keeps its state, and who approves rounds."""

import re
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from protos.config import Address, ConfigError, StrictConfig, TlsConfig, read_toml
from trust.identity import IdentityError, hosts_of

_LOOPBACK: Final = re.compile(r"(localhost|127(\.[0-9]{1,3}){3}):[0-9]{1,5}")


class OidcConfig(StrictConfig):
    """[console.oidc]: people sign in by their organisation's OpenID Connect provider, too."""

    issuer: str = Field(pattern=r"^(https://[^\s?#]+|http://(localhost|127\.0\.0\.1)[^\s?#]*)$")
    """As the provider names itself, such as https://login.example.org/realms/hub."""
    client_id: str = Field(min_length=1)
    """As the provider knows this console; its redirect address is ORIGIN/login/callback."""
    client_secret_file: Path | None = None
    """File with the client's secret; None: the provider takes PKCE alone."""
    claim: Literal["sub", "email", "preferred_username", "upn"] = "sub"
    """What of the ID token names a person: the --sso of `cofuse coordinator user add`."""

    def client_secret(self) -> str:
        """The secret, read anew; empty: there is none. Raises: OSError."""
        path = self.client_secret_file
        return path.read_text(encoding="utf-8").strip() if path else ""


class ConsoleConfig(StrictConfig):
    """[console]: the pages for researchers and operators. Without this table there are none."""

    listen: Address = "127.0.0.1:8080"
    """host:port. Anything but loopback needs certificate and key: people type passwords here."""
    origin: str = Field(default="", pattern=r"^(https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?)?$")
    """What people type, such as https://fuse.example.org, when it is not loopback's name."""
    certificate: Path | None = None
    """PEM, for HTTPS; one that browsers trust."""
    key: Path | None = None
    oidc: OidcConfig | None = None
    """Signing in by a provider. Default: by password alone."""

    @property
    def is_https(self) -> bool:
        """Whether browsers reach it over TLS, ours or a proxy's."""
        return self.certificate is not None or self.origin.startswith("https:")

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names under which browsers may ask for it."""
        named = urlsplit(self.origin).hostname if self.origin else None
        listening = self.listen.rpartition(":")[0]
        return (listening, named) if named else (listening,)

    def below(self, folder: Path) -> "ConsoleConfig":
        """The same, relative paths taken from `folder`."""
        found = {name: getattr(self, name) for name in ("certificate", "key")}
        moved: dict[str, object] = {name: path and folder / path for name, path in found.items()}
        if self.oidc is not None and self.oidc.client_secret_file is not None:
            secret = folder / self.oidc.client_secret_file
            moved["oidc"] = self.oidc.model_copy(update={"client_secret_file": secret})
        return self.model_copy(update=moved)

    @model_validator(mode="after")
    def _not_in_the_clear(self) -> "ConsoleConfig":
        if (self.certificate is None) != (self.key is None):
            raise ValueError("found one of certificate and key, wanted both or none")
        if self.certificate is None and not is_loopback(self.listen):
            raise ValueError(
                f"found listen {self.listen!r} without certificate and key, wanted them, or "
                "127.0.0.1:port and a proxy with TLS before it: passwords are typed here"
            )
        return self


def is_loopback(address: str) -> bool:
    """Whether host:port is reached from this machine alone."""
    return bool(_LOOPBACK.fullmatch(address))


def _is_own(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


class CoordinatorConfig(StrictConfig):
    """Everything in coordinator.toml. Relative paths start at its folder."""

    listen: Address = "127.0.0.1:7443"
    """host:port of the gRPC services, mutual TLS. Port 0 picks a free one."""
    engine_listen: Address = "127.0.0.1:9443"
    """host:port of the engine's public port, mutual TLS."""
    engine_advertise: Address | None = None
    """What participants are told to dial, when a proxy or NAT stands before it. Default: what
    reached_at says of engine_listen."""
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
    promotion: Literal["auto", "one", "two"] = "auto"
    """How many operators must say yes to a pivot before others may use it (cofuse pivot promote);
    auto: the round's gates alone decide."""
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
    console: ConsoleConfig | None = None
    """The pages for researchers and operators. Default: none."""
    tls: TlsConfig

    def store_url(self) -> str:
        """Where the database is, as coordinator/database.py wants it."""
        return self.store or f"sqlite:///{self.data_dir / 'coordinator.sqlite'}"

    def reached_at(self, listen: str) -> str:
        """host:port at which others dial what listens there: 0.0.0.0 is nowhere they could go.

        It is the host listened on where our certificate has it, else the first one there that is
        not this machine's own; callers refuse all others.
        Raises: protos.config.ConfigError when the certificate cannot be read.
        """
        host, _, port = listen.rpartition(":")
        try:
            hosts = hosts_of(self.tls.certificate.read_bytes())
        except (OSError, IdentityError) as error:
            raise ConfigError(f"tls.certificate: {self.tls.certificate}: {error}") from error
        if not hosts or host.strip("[]") in hosts:
            return listen
        best = min(hosts, key=_is_own)
        return f"[{best}]:{port}" if ":" in best else f"{best}:{port}"

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
        if not is_loopback(value):
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
            "console": config.console and config.console.below(here),
            "tls": config.tls.below(here),
        }
    )
