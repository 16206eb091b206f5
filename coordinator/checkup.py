"""The walls around the coordinator's key holders, each tried: `cofuse coordinator doctor`."""

from pathlib import Path

from coordinator.audit import FOLDER
from coordinator.config import CoordinatorConfig
from coordinator.sealed import worker_folder
from coordinator.signing import SIGNER_KEY
from coordinator.walls import ROLES
from trust.attempts import Checkup, Finding, findings, network, outside, places, probe
from trust.ca import AUTHORITY_KEY
from trust.seal_keys import PRIVATE_FILE


def check(coordinator_toml: Path, config: CoordinatorConfig) -> Checkup:
    """Try every wall. Raises: OSError, RuntimeError when a probe itself fails."""
    found: list[Finding] = []
    missing: list[str] = []
    with outside() as (port, name):
        attempts = network(port, name) + places(_places(coordinator_toml, config))
        for role in ROLES:
            held, outcomes = probe("coordinator.probe", [role, str(coordinator_toml)], attempts)
            missing += [f"{role}: {words}" for words in held.missing]
            found += findings(role, attempts, held, outcomes)
    return Checkup(findings=tuple(found), missing=tuple(missing))


def _places(coordinator_toml: Path, config: CoordinatorConfig) -> list[tuple[str, Path, str]]:
    """Verb, place, and what it would mean."""
    data, worker = config.data_dir, worker_folder(config.tls.key)
    authority = config.authority or config.tls.ca.parent
    return [
        ("read", authority / AUTHORITY_KEY, "reads the authority's key"),
        ("read", config.tls.key, "reads the server's key"),
        ("read", config.tls.key.with_name(SIGNER_KEY), "reads the pivots' key"),
        ("read", coordinator_toml, "reads the settings"),
        ("read", data / "coordinator.sqlite", "reads the database"),
        ("write", data / "coordinator.sqlite", "changes the database"),
        ("list", data / FOLDER, "looks into the audit chain's folder"),
        ("make", data, "writes beside its own folders"),
        ("make", data / "artifacts", "puts a file among those of the store"),
        ("write", worker / PRIVATE_FILE, "changes its key"),
        ("make", config.tls.key.parent, "puts a file beside the keys"),
    ]
