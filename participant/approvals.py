"""Finished releases that wait for a person: one file says what would leave, one what was decided.

Files, and no word over a socket, so that a decision outlives the daemon and needs none to run. A
decision is about the bytes that were shown: it names their sha256, and the approver's key signs it.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from fusion.pair_file import read_pairs
from participant.durable import write_durably
from participant.policy import Kind
from protos.files import flush
from protos.public_sets import read_prompts
from trust.keys import (
    PUBLIC_SUFFIX,
    KeyFileError,
    kid,
    load_private,
    load_public,
    new_key,
    save_public,
)
from trust.statements import Approval, StatementError, sign, verify

_LOG = logging.getLogger(__name__)
FOLDER: Final = "approvals"
APPROVER_KEY: Final = "approver.pem"
"""Beside the data folder; its public half, approver.pub, is what the guard asks. Whoever approves
may keep the private one elsewhere."""
TTL_MS: Final = 72 * 3600 * 1000
_RELEASE, _DECISION = ".release.json", ".decision.json"


class ApprovalError(ValueError):
    """A decision that cannot be taken; the message says what to do."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


_Found = TypeVar("_Found", bound=_File)


class Release(_File):
    """What would leave, as an approver sees it."""

    round_id: str
    purpose: str
    submitted_by: str
    kind: Kind
    rule: str
    """Of policy.toml, that allows it."""
    top_k: int
    """0 for pairs and weights."""
    positions: int
    """Tokens of public text; 0 for weights."""
    size_bytes: int
    sha256: str
    scores: bool
    """Whether the expert's own scores go with it."""
    gates: Annotated[str, StringConstraints(max_length=500)] = ""
    """What the canary gate measured of it; empty where the gate is off."""
    asked_unix_ms: int

    @property
    def what(self) -> str:
        """What would leave, in words."""
        told = {
            "weights": "weights of a pivot that was trained here",
            "pairs": "how likely the expert finds both answers of public pairs",
            "grown": f"the top {self.top_k} log-probabilities of a pivot that was trained here",
        }.get(self.kind, f"the top {self.top_k} log-probabilities of the expert")
        return told + (", and the expert's own scores" if self.scores else "")

    @property
    def release_id(self) -> str:
        """Names the round and the bytes."""
        return f"{self.round_id}-{self.sha256[:8]}"

    @property
    def expires_unix_ms(self) -> int:
        """From when on silence is a no."""
        return self.asked_unix_ms + TTL_MS


class Decision(_File):
    """What a person of the institution said."""

    approved: bool
    by: str
    why: Annotated[str, StringConstraints(max_length=500)] = ""
    """Of a refusal: told to the submitter."""
    sha256: str
    unix_ms: int
    signed: str = ""
    """All of it, under the approver's key (trust/statements.py)."""


class Approvals:
    """The folder of both; for any number of processes."""

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        key: Path | None = None,
    ) -> None:
        """Args: clock: unix ms. key: the approver's private one, if it lies elsewhere."""
        self._folder = folder
        self._clock = clock
        self._public = folder.parent.with_name(APPROVER_KEY).with_suffix(PUBLIC_SUFFIX)
        self._key = key or folder.parent.with_name(APPROVER_KEY)

    def ask(self, release: Release) -> Release:
        """Put a release before the approvers, once; return it as it was first asked for."""
        path = self._path(release.release_id, _RELEASE)
        if (known := _read(path, Release)) is not None:
            same = {"asked_unix_ms": known.asked_unix_ms}
            if known == release.model_copy(update=same):
                return known
        if not self._folder.exists():
            self._folder.mkdir(parents=True)
            flush(self._folder.parent)
        write_durably(path, release.model_dump_json())
        return release

    def decision(self, release: Release) -> Decision | None:
        """What was decided about these bytes; None: nothing yet."""
        found = _read(self._path(release.release_id, _DECISION), Decision)
        if found is None or found.sha256 != release.sha256:
            return None
        try:
            signed = verify(Approval, found.signed, load_public(self._public))
        except (StatementError, KeyFileError, OSError) as error:
            _LOG.warning("a decision on %s counts for nothing: %s", release.release_id, error)
            return None
        return found if signed == _statement(release, found) else None

    def expired(self, release: Release) -> bool:
        """Whether nobody decided in time."""
        return self.decision(release) is None and self._clock() >= release.expires_unix_ms

    def waiting(self) -> list[Release]:
        """Releases that a person may still decide about, longest waiting first."""
        paths = self._folder.glob(f"*{_RELEASE}")
        found = [release for path in paths if (release := _read(path, Release)) is not None]
        still = [one for one in found if self.decision(one) is None and not self.expired(one)]
        return sorted(still, key=lambda release: release.asked_unix_ms)

    def find(self, release_id: str) -> Release:
        """One that waits. Raises: ApprovalError."""
        for release in self.waiting():
            if release_id in (release.release_id, release.round_id):
                return release
        ids = ", ".join(release.release_id for release in self.waiting()) or "none"
        raise ApprovalError(f"found no release {release_id!r} that waits, wanted one of: {ids}")

    def decide(self, release: Release, *, approved: bool, by: str, why: str = "") -> Decision:
        """Decide, once and for these bytes.

        Raises: ApprovalError when it is decided or over, the approver asked for it, or the key is
            not the approvers'.
        """
        if by == release.submitted_by:
            raise ApprovalError(f"found {by!r} on both sides: whoever asks does not approve")
        self.find(release.release_id)
        decision = Decision(
            approved=approved, by=by, why=why, sha256=release.sha256, unix_ms=self._clock()
        )
        signed = sign(_statement(release, decision), self._private())
        decision = decision.model_copy(update={"signed": signed})
        write_durably(self._path(release.release_id, _DECISION), decision.model_dump_json())
        return decision

    def _private(self) -> Ed25519PrivateKey:
        """The approver's key; the first approval of an institution makes it."""
        try:
            if not self._public.exists() and not self._key.exists():
                new_key(self._key)
            key = load_private(self._key)
            if not self._public.exists():
                save_public(key.public_key(), self._public)
            if kid(load_public(self._public)) != kid(key.public_key()):
                raise KeyFileError(f"{self._key}: found another key than {self._public} names")
        except (KeyFileError, OSError) as error:
            raise ApprovalError(f"{error}; name the approver's key with --key") from error
        return key

    def close(self, round_id: str) -> None:
        """Ask nobody about a round any more; what was decided stays on file."""
        for path in self._folder.glob(f"{round_id}-*{_RELEASE}"):
            release = _read(path, Release)
            if release is None or (release.round_id == round_id and not self.decision(release)):
                path.unlink(missing_ok=True)

    def _path(self, release_id: str, kind: str) -> Path:
        return self._folder / f"{release_id}{kind}"


def _statement(release: Release, decision: Decision) -> Approval:
    return Approval(
        sha256=release.sha256,
        round_id=release.round_id,
        approved=decision.approved,
        by=decision.by,
        why=decision.why,
        gates=release.gates,
        unix_ms=decision.unix_ms,
    )


def public_texts(data_dir: Path, round_id: str) -> list[str]:
    """The public texts that a round asks about, as far as they are here: what a person may read.

    Raises: PublicSetError.
    """
    folder = data_dir / "rounds" / round_id
    if (pairs := folder / "pairs.jsonl").exists():
        return read_pairs(pairs).texts()
    prompts = folder / "prompts.jsonl"
    return read_prompts(prompts) if prompts.exists() else []


def _read(path: Path, model: type[_Found]) -> _Found | None:
    """A file of ours; None when it is not there. One that is damaged says nothing."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
