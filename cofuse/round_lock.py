"""round.lock.yaml: every digest that a round stands on, so that it can be made again.

The spec with all its keys and its files by digest, the pivot it starts from by content, and, of a
round that has ended, what went in and what came out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import yaml
from pydantic import Field, ValidationError

from protos.faults import with_lines
from protos.spec import PUBLIC_SETS, RoundSpec, SpecError, Strict, load_spec

if TYPE_CHECKING:
    from cofuse.sdk import Coordinator
    from trust.pivot_manifest import Manifest

LOCK_FILE: Final = "round.lock.yaml"
_KEY: Final = "cofuse_lock"
_FILES: Final = PUBLIC_SETS


class LockError(ValueError):
    """A lock that does not fit what is here; the message names file and cure."""


class LockedFile(Strict):
    """A file of the spec."""

    path: str
    """From the lock's folder."""
    sha256: str
    bytes: int


class LockedPivot(Strict):
    """A pivot, by what it is."""

    name: str
    content_sha256: str


class LockedInput(Strict):
    """What one participant shipped."""

    participant: str
    sha256: str
    bytes: int


class Outcome(Strict):
    """What became of a round."""

    round_id: str
    inputs: tuple[LockedInput, ...]
    pivot: LockedPivot


class Lock(Strict):
    """A round.lock.yaml."""

    cofuse_lock: Literal[1] = 1
    spec: RoundSpec
    files: dict[str, LockedFile] = Field(default_factory=dict)
    pivot: LockedPivot | None = None
    """None: made without a coordinator."""
    outcome: Outcome | None = None

    def yaml(self) -> str:
        """As it is written; the same lock gives the same bytes."""
        values = self.model_dump(mode="json", exclude_none=True)
        said = "# Made by `cofuse round lock`; `cofuse round submit` makes this very round again.\n"
        return said + yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A spec or a lock, ready to be submitted."""

    spec: RoundSpec
    folder: Path
    """Where the paths in the spec start."""
    lock: Lock | None = None

    def require_pivot(self, coordinator: "Coordinator") -> None:
        """Make sure that the coordinator's pivot is the one that was locked. Raises: LockError."""
        wanted = self.lock.pivot if self.lock else None
        if wanted is None:
            return
        found = coordinator.manifest(wanted.name).content_sha256
        if found != wanted.content_sha256:
            raise LockError(
                f"found another {wanted.name} (content {found[:16]}) than was locked "
                f"({wanted.content_sha256[:16]}): ask the coordinator that the lock was made with"
            )


def lock_of(path: Path, coordinator: "Coordinator | None") -> Lock:
    """Pin everything that a spec names. Args: coordinator: None: its pivot is not pinned.

    Raises: SpecError, OSError, RemoteError.
    """
    from protos.chunks import sha256_of

    spec = load_spec(path)
    files = {}
    for key in _FILES:
        value = getattr(spec, key)
        if value is not None and not value.startswith("sha256:"):
            file = path.parent / value
            size = file.stat().st_size
            files[key] = LockedFile(path=value, sha256=sha256_of(file), bytes=size)
    pinned = {key: f"sha256:{file.sha256}" for key, file in files.items()}
    pivot = coordinator and _locked(coordinator.manifest(spec.pivot))
    return Lock(spec=spec.model_copy(update=pinned), files=files, pivot=pivot or None)


def lock_of_round(round_id: str, coordinator: "Coordinator") -> Lock:
    """Pin a round that was published. Raises: LockError, RemoteError."""
    found = coordinator.round(round_id)
    if found.state != "PUBLISHED":
        raise LockError(f"{round_id} is {found.state}, wanted a round that made a pivot")
    made = coordinator.manifest(found.pivot_name)
    inputs = tuple(
        LockedInput(participant=i.participant, sha256=i.sha256, bytes=i.size_bytes)
        for i in made.inputs
    )
    outcome = Outcome(round_id=round_id, inputs=inputs, pivot=_locked(made))
    start = _locked(coordinator.manifest(found.spec.pivot))
    return Lock(spec=found.spec, pivot=start, outcome=outcome)


def load_round(path: Path) -> Loaded:
    """Read a spec or a lock; a lock's files must be what they were.

    Raises: SpecError, LockError with file, line and cure.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values: Any = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return Loaded(load_spec(path), path.parent)  # whose errors have the words
    if not isinstance(values, dict) or _KEY not in values:
        return Loaded(load_spec(path), path.parent)
    try:
        lock = Lock.model_validate(values)
    except ValidationError as error:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        raise LockError(with_lines(path, root, error, Lock)) from error
    paths = {key: file.path for key, file in lock.files.items() if _is_there(path, file)}
    if odd := paths.keys() - set(_FILES):
        raise SpecError(f"{path}: files: found {', '.join(odd)}, wanted {' or '.join(_FILES)}")
    return Loaded(lock.spec.model_copy(update=paths), path.parent, lock)


def _is_there(lock: Path, locked: LockedFile) -> bool:
    """Whether the file is here, unchanged; one that is not is left to the coordinator's copy."""
    file = lock.parent / locked.path
    if not file.is_file():
        return False
    from protos.chunks import sha256_of  # and with it gRPC: a fault of the spec is told without

    if (found := sha256_of(file)) != locked.sha256:
        raise LockError(
            f"{file}: found sha256 {found[:16]}, wanted {locked.sha256[:16]} as {lock} says: bring "
            "the old file back, or make the lock again"
        )
    return True


def _locked(manifest: "Manifest") -> LockedPivot:
    return LockedPivot(name=manifest.name, content_sha256=manifest.content_sha256)
