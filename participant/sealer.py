"""Closes what leaves: signed by the guard's own key, sealed to the fusion worker's.

The coordinator's server, the object store and the courier see who sends how much, for which round,
and nothing else of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from participant.config import ParticipantConfig
from trust.keys import KeyFileError, load_private, new_key
from trust.seal import SealError, seal_file
from trust.seal_keys import RECIPIENT_FILE, Recipient, load_recipient
from trust.statements import Release, raw_hex, sign

RELEASE_KEY: Final = "release-key.pem"
"""Of the data folder: signs what leaves. The coordinator keeps to the first one that it sees."""


@dataclass(frozen=True, slots=True)
class Sealer:
    """Who may open what leaves, and the key that vouches for it."""

    participant: str
    recipient: Recipient
    key: Ed25519PrivateKey

    @classmethod
    def of(cls, config: ParticipantConfig) -> "Sealer":
        """The keys of an institution. Raises: as at()."""
        public = config.tls.ca.with_name(RECIPIENT_FILE)
        return cls.at(config.name, public, config.data_dir / RELEASE_KEY)

    @classmethod
    def at(cls, participant: str, public: Path, private: Path) -> "Sealer":
        """Read the fusion worker's public key, and our private one, which is made at first.

        Raises: SealError when there is no key to seal to. KeyFileError, OSError.
        """
        recipient = _recipient(public)
        if not private.exists():
            new_key(private)
        return cls(participant, recipient, load_private(private))

    def seal(self, release: Release, plain: Path, out: Path) -> None:
        """Sign what `plain` is, and seal both to the fusion worker. Raises: SealError, OSError."""
        signed = release.model_copy(update={"key": raw_hex(self.key.public_key())})
        seal_file(plain, out, self.recipient, sign(signed, self.key))


def unsealable(config: ParticipantConfig) -> str:
    """Why nothing that is asked for could leave; empty: there is somebody to seal to."""
    try:
        _recipient(config.tls.ca.with_name(RECIPIENT_FILE))
    except SealError as error:
        return str(error)
    return ""


def _recipient(public: Path) -> Recipient:
    try:
        return load_recipient(public)
    except (KeyFileError, OSError) as error:
        raise SealError(
            f"no key to seal to ({error}): get {RECIPIENT_FILE} from the operator, put it "
            "beside ca.pem, and the round goes on when it is issued again"
        ) from error
