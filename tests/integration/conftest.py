"""A coordinator that serves on loopback, and identities of its authority."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from coordinator.config import CoordinatorConfig
from coordinator.sealed import ensure_worker_key, worker_folder
from coordinator.wiring import serving
from protos.config import TlsConfig
from protos.tls import TlsFiles
from tests.flower_state import ready_made_flower_state as ready_made_flower_state
from trust.ca import Role, create_authority, new_identity, sign_request
from trust.seal_keys import RECIPIENT_FILE

MakeIdentity = Callable[[Role, str], TlsFiles]


def identities_at(folder: Path) -> MakeIdentity:
    """Make certificates of one authority, below a folder."""
    authority = folder / "ca"
    create_authority(authority, "test")

    def make(role: Role, name: str) -> TlsFiles:
        home = folder / f"{role}-{name}"
        if not home.exists():
            request = new_identity(home, role, name)
            certificate = sign_request(authority, request, role=role, name=name)
            (home / "certificate.pem").write_bytes(certificate)
        return TlsFiles(
            ca=authority / "ca.pem", certificate=home / "certificate.pem", key=home / "key.pem"
        )

    return make


def config_at(folder: Path, identities: MakeIdentity) -> CoordinatorConfig:
    """A coordinator whose rounds wait for an operator."""
    files = identities("coordinator", "coordinator")
    ensure_worker_key(worker_folder(files.key), files.ca.with_name(RECIPIENT_FILE))
    return CoordinatorConfig(
        listen="127.0.0.1:0",
        engine_listen="127.0.0.1:0",
        data_dir=folder / "data",
        max_upload_bytes=50_000_000,
        tls=TlsConfig(ca=files.ca, certificate=files.certificate, key=files.key),
    )


@pytest.fixture
def identities(tmp_path: Path) -> MakeIdentity:
    """Make certificates of one authority."""
    return identities_at(tmp_path)


@pytest.fixture
def address(tmp_path: Path, identities: MakeIdentity) -> Iterator[str]:
    """Serve a coordinator whose rounds wait for an operator; yield its address."""
    with serving(config_at(tmp_path, identities)) as running:
        yield running.address
