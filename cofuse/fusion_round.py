"""A round in Python: say what is asked for, submit it, wait, look, take the pivot home."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from cofuse.evals import Evals
from cofuse.sdk_rows import Event, Pivot, Round
from fusion.public_files import READERS, check_public
from protos.spec import RoundSpec, SpecError, first_message
from protos.v1 import transfer_pb2
from protos.v1.transfer_pb2 import ArtifactKind

if TYPE_CHECKING:
    from cofuse.sdk import Coordinator


class RoundFailedError(Exception):
    """A round ended without a pivot."""

    def __init__(self, final: Round, events: list[Event]) -> None:
        self.round = final
        self.code = final.state
        self.hint = f"cofuse why {final.round_id}"
        self.events = events
        words = f"{final.round_id} ended {final.state}: {final.detail}".rstrip(": ")
        super().__init__(words.rstrip(".") + f". See: {self.hint}")


class WaitTimedOutError(TimeoutError):
    """Nobody waits any longer; the round goes on."""

    error_id = "wait_timed_out"


class FusionRound:
    """What a researcher asks for: the keys of a round spec, and where its files are."""

    def __init__(self, *, folder: Path = Path(), **fields: Any) -> None:
        """Args: folder: where relative paths start. fields: as in the YAML; see `cofuse schema`.

        Raises: SpecError with the key and the cure.
        """
        try:
            self.spec = RoundSpec.model_validate(fields)
        except ValidationError as error:
            raise SpecError(first_message(error)) from error
        self.folder = folder

    @classmethod
    def load(cls, path: str | Path) -> "FusionRound":
        """Read a spec, or a round.lock.yaml. Raises: SpecError, LockError with file and line."""
        from cofuse.round_lock import load_round

        found = load_round(Path(path))
        return cls(folder=found.folder, **found.spec.model_dump())


def pinned(spec: RoundSpec, folder: Path, upload: Callable[[Path, ArtifactKind], str]) -> RoundSpec:
    """Upload the files that a spec names, relative to `folder`; return it with their digests.

    Raises: PublicSetError, and what `upload` raises.
    """
    digests = {}
    for field in READERS:
        value = getattr(spec, field)
        if value is not None and not value.startswith("sha256:"):
            path = folder / value
            # Its errors name file and line, which the other side cannot.
            kind = check_public(spec, field, path)
            digests[field] = f"sha256:{upload(path, getattr(transfer_pb2, kind))}"
    return spec.model_copy(update=digests)


@dataclass(frozen=True, slots=True)
class PublishedPivot:
    """The pivot that a round made."""

    name: str
    _coordinator: "Coordinator"

    def manifest(self) -> Pivot:
        """Its files and evaluations."""
        return self._coordinator.pivot(self.name)

    def download(self, folder: str | Path | None = None) -> Path:
        """Bring it here, signature and digests checked; default: a folder of its name."""
        return self._coordinator.download_pivot(self.name, Path(folder or self.name))


class SubmittedRound(str):
    """A round's id that knows whom to ask about it."""

    _coordinator: "Coordinator"

    def __new__(cls, round_id: str, coordinator: "Coordinator") -> "SubmittedRound":
        """The id itself is the text."""
        made = super().__new__(cls, round_id)
        made._coordinator = coordinator
        return made

    @property
    def id(self) -> str:
        """As `cofuse round ls` shows it."""
        return str(self)

    def now(self) -> Round:
        """Its state at this moment."""
        return self._coordinator.round(self)

    def events(self, *, after_seq: int = 0) -> Iterator[Event]:
        """Everything that has happened and happens, until it ends."""
        return self._coordinator.watch(self, after_seq=after_seq)

    def wait(self, timeout: float | None = None) -> Round:
        """Block until it is published; return it.

        Args: timeout: seconds; None: as long as it takes.
        Raises: RoundFailedError, WaitTimedOutError.
        """
        events = list(self._coordinator.watch(self, timeout_s=timeout))
        final = self.now()
        if final.state != "PUBLISHED":
            raise RoundFailedError(final, events)
        return final

    def pivot(self) -> PublishedPivot:
        """The pivot it made. Raises: RoundFailedError when it has made none yet, or never will."""
        final = self.now()
        if final.state != "PUBLISHED":
            raise RoundFailedError(final, [])
        return PublishedPivot(final.pivot_name, self._coordinator)

    def evals(self) -> Evals:
        """How its pivot and the models beside it did. Raises: as pivot()."""
        return Evals.of(self.pivot().manifest().evals)

    def cancel(self) -> Round:
        """End it."""
        return self._coordinator.cancel(self)
