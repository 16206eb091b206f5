"""The coordinator's parts, each made in turn; whoever makes them stops them with the stack."""

import contextlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from coordinator.admission import Members
from coordinator.artifacts import Artifacts, open_artifacts
from coordinator.auditor import Auditor
from coordinator.config import CoordinatorConfig
from coordinator.engine import Engine, EngineConfig
from coordinator.fleet_service import waited_for
from coordinator.health import Health
from coordinator.opening import Opening
from coordinator.presence import Presence
from coordinator.promotion import NEEDED
from coordinator.refusals import Refusals
from coordinator.revocations import Revocations
from coordinator.sealed import worker_folder
from coordinator.signing import Signer, ensure_key
from coordinator.store import Store
from coordinator.store_errors import StoreError
from coordinator.upkeep import Upkeep
from protos import systemd
from protos.config import ConfigError
from protos.files import settle
from trust.ca import AUTHORITY_KEY
from trust.chain import AuditError
from trust.keys import KeyFileError
from trust.seal_keys import RECIPIENT_FILE


@dataclass(frozen=True, slots=True)
class Keys:
    """What signs and what opens."""

    signing: Path
    """The pivots' key."""
    worker: Path
    """Folder of the fusion worker's key, which this process never reads."""
    opening: Opening


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the services share."""

    config: CoordinatorConfig
    store: Store
    artifacts: Artifacts
    engine: Engine
    presence: Presence
    health: Health
    members: Members
    signer: Signer
    opening: Opening
    refusals: Refusals
    revocations: Revocations


def open_keys(stack: ExitStack, config: CoordinatorConfig) -> Keys:
    """Read or make what signs; start the child that alone opens what is sealed."""
    with told("tls"):
        config.tls.files().read()  # its errors name the file; the libraries' do not
        signing = ensure_key(config.tls.key, config.tls.ca)
    worker = worker_folder(config.tls.key)
    public = config.tls.ca.with_name(RECIPIENT_FILE)
    opening = Opening(worker, public, config.data_dir / "artifacts")
    stack.callback(opening.stop)
    with told("tls"):
        opening.start()
    if config.authority is not None:
        with told("authority"):
            (config.authority / AUTHORITY_KEY).read_bytes()
    return Keys(signing, worker, opening)


def open_storage(stack: ExitStack, config: CoordinatorConfig) -> tuple[Store, Artifacts]:
    """Open the database and the files, once what a killed process left is on disk."""
    with told("data_dir"):
        settle(config.data_dir)
    with told("artifacts"):
        artifacts = open_artifacts(config.data_dir, config.artifacts)
    with told("store"):
        store = Store(config.store_url(), lead=True, backups=config.data_dir)
    store.promotions_needed = NEEDED[config.promotion]
    stack.callback(store.close)
    return store, artifacts


def make_parts(
    stack: ExitStack, config: CoordinatorConfig, keys: Keys, store: Store, artifacts: Artifacts
) -> Parts:
    """Make what the services share; what has a thread of its own is at work."""
    with told("data_dir"):
        auditor = Auditor(store, config.data_dir)
    auditor.start()
    stack.callback(auditor.stop)
    refusals = Refusals(store)
    refusals.start()
    stack.callback(refusals.stop)
    with told("tls"):
        signer = Signer(store, artifacts, keys.signing)
    signer.renew()  # before anybody asks: pivots of an older release have no manifest
    scrubbed = config.data_dir / "artifacts" / "scrubbed"
    upkeep = Upkeep(artifacts, store, scrubbed, renew=signer.renew)
    upkeep.start()
    stack.callback(upkeep.stop)
    revocations = Revocations(store.database)
    members = Members(revocations)
    members.refresh()  # before anybody may call
    with told("engine_listen"):
        engine = _engine(config, members)
        engine.listen()
    stack.callback(engine.stop)
    return Parts(
        config=config,
        store=store,
        artifacts=artifacts,
        engine=engine,
        presence=Presence(lambda round_id: waited_for(store, round_id), wave=config.wave),
        health=Health(
            {"database": store.check_writable, "artifacts": artifacts.check_writable},
            beat=lambda: systemd.notify(systemd.WATCHDOG),
        ),
        members=members,
        signer=signer,
        opening=keys.opening,
        refusals=refusals,
        revocations=revocations,
    )


def _engine(config: CoordinatorConfig, members: Members) -> Engine:
    host, _, port = config.engine_listen.rpartition(":")
    return Engine(
        EngineConfig(
            state_dir=config.data_dir / "engine",
            public_host=host,
            public_port=int(port),
            ca=config.tls.ca,
            certificate=config.tls.certificate,
            key=config.tls.key,
            refusal=members.refusal,
        )
    )


@contextlib.contextmanager
def told(key: str) -> Iterator[None]:
    """What the system refuses is said as the key of the configuration that asked for it."""
    try:
        yield
    except StoreError as error:  # it says itself what is to be done
        raise ConfigError(f"{key}: {error}") from error
    except (OSError, RuntimeError, KeyFileError, AuditError) as error:
        raise ConfigError(f"{key}: {error}; correct it in coordinator.toml") from error
