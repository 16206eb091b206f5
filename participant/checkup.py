"""The walls between the participant's processes, each tried: `cofuse doctor` tells of it."""

from pathlib import Path
from typing import Final

from participant.config import ParticipantConfig
from participant.egress import FOLDER, EgressLog
from participant.sandbox import ROLES, SEALED, Role, make_folders
from trust.attempts import Attempt, Checkup, Finding, findings, network, outside, places, probe

_PROVED: Final = frozenset({"held", "broken"})


def check(participant_toml: Path, config: ParticipantConfig) -> Checkup:
    """Try every wall. Raises: OSError, RuntimeError when a probe itself fails."""
    make_folders(config)
    found: list[Finding] = []
    missing: list[str] = []
    with outside() as (port, name):
        for role in ROLES:
            attempts = attempts_of(role, config, port, name)
            held, outcomes = probe("participant.probe", [role, str(participant_toml)], attempts)
            missing += [f"{role}: {words}" for words in held.missing]
            found += findings(role, attempts, held, outcomes)
    return Checkup(findings=tuple(found), missing=tuple(missing))


def attempts_of(role: Role, config: ParticipantConfig, port: int, name: str) -> list[Attempt]:
    """What a process is to try, of what there is. Args: port, name: where somebody listens."""
    out = network(port, name) if role != "courier" else network(port, name)[-2:]
    return out + places(_places(role, config))


def _places(role: Role, config: ParticipantConfig) -> list[tuple[str, Path, str]]:
    """Verb, place, and what it would mean."""
    data = config.data_dir
    places: dict[Role, list[tuple[str, Path, str]]] = {
        "trainer": [
            ("make", data / SEALED, "puts a file among those that may leave"),
            ("make", data / FOLDER, "puts a file into the audit chain's folder"),
            ("make", data, "writes beside its own folders"),
            ("write", config.policy, "changes the policy"),
            ("write", config.tls.key, "changes the key"),
        ],
        "guard": [],
        "courier": [
            ("read", config.corpus, "reads the corpus"),
            ("write", config.corpus, "changes the corpus"),
            ("list", data / "expert", "looks into the expert's folder"),
            ("read", data / "expert" / "model" / "model.safetensors", "reads the expert"),
            ("list", data / "outbox", "looks into the outbox"),
            ("list", data / "guard", "sees what is about to be sealed"),
            ("list", data / FOLDER, "looks into the audit chain's folder"),
            ("write", config.policy, "changes the policy"),
            ("make", data / SEALED, "puts a file among those that may leave"),
        ],
    }
    return places[role]


def record(config: ParticipantConfig, found: Checkup) -> None:
    """Put the outcome on the participant's chain. Raises: AuditError, KeyFileError, OSError."""
    EgressLog(config.data_dir, config.name).checked(
        broken=[f"{one.role} {one.says}" for one in found.broken],
        not_enforceable=[
            f"{one.role} {one.says}" for one in found.findings if one.verdict not in _PROVED
        ],
        tried=len(found.findings),
    )
