"""The fusion worker's side of what participants seal: its folder, its key, and how files open.

The folder holds the private key, and the public key of each participant's guard as it was first
seen: a thief of a participant's TLS key cannot sign in the guard's name. The server's process reads
nothing of it; the opener and the fusion worker do.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from protos.files import flush
from trust.keys import KeyFileError, load_public, save_public
from trust.seal import MAGIC, SealError, open_file, read_header
from trust.seal_keys import PRIVATE_FILE, Opener, load_opener, new_pair, save_recipient
from trust.statements import Release, StatementError, verify_release

SENDERS: Final = "senders"
RETIRED: Final = "retired"
"""Keys that nothing new is sealed to; they open what was sealed before."""
FOLDER: Final = "worker"


def worker_folder(tls_key: Path) -> Path:
    """Where the fusion worker's key lies: beside the TLS key, in a folder of its own."""
    return tls_key.with_name(FOLDER)


def ensure_worker_key(folder: Path, public: Path) -> str:
    """Make the fusion worker's pair unless it is there, its public half at `public`.

    Returns: its kid. Raises: KeyFileError, OSError.
    """
    private = folder / PRIVATE_FILE
    (folder / SENDERS).mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    if not private.exists():
        if public.exists():
            raise KeyFileError(
                f"{private} is gone, and participants seal to {public.name}: put it back from "
                f"where you keep the hub's keys; or remove {public} for a new pair, which every "
                "participant then needs"
            )
        new_pair(private)
    save_recipient(private, public)
    return load_opener(private).recipient.kid


def rotate_worker_key(folder: Path, public: Path) -> tuple[str, str]:
    """Make a new pair, and retire the old one, which still opens what was sealed to it.

    Killed at any line, it may be repeated. Returns: the old and the new kid.
    Raises: KeyFileError, OSError.
    """
    private, following = folder / PRIVATE_FILE, folder / "next.pem"
    old = load_opener(private).recipient.kid
    (folder / RETIRED).mkdir(mode=0o700, exist_ok=True)
    kept = folder / RETIRED / f"{old}.pem"
    if not kept.exists():
        os.link(private, kept)
        flush(kept.parent)
    following.unlink(missing_ok=True)
    new = new_pair(following)
    following.replace(private)
    flush(folder)
    save_recipient(private, public)
    return old, new


def forget_retired_keys(folder: Path) -> list[str]:
    """Destroy the retired keys; what is sealed to them opens never again. Returns: their kids."""
    paths = sorted((folder / RETIRED).glob("*.pem"))
    for path in paths:
        path.unlink()
    return [path.stem for path in paths]


@dataclass(frozen=True, slots=True)
class Worker:
    """Who opens: the private keys, and the guards whose signatures count."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> "Worker":
        """Raises: KeyFileError, OSError when there is no key of today."""
        load_opener(folder / PRIVATE_FILE)
        return cls(folder)

    def open(self, path: Path, out: Path, *, round_id: str, participant: str) -> Release:
        """Open a contribution, if it is what this participant's guard let out for this round.

        Returns: what the guard signed. Raises: SealError (nothing is left at `out`), OSError.
        """
        out.unlink(missing_ok=True)
        known = self._known(participant)
        try:
            release, key = verify_release(read_header(path).statement, known)
            if (release.round_id, release.participant) != (round_id, participant):
                raise StatementError(
                    f"released by {release.participant} for {release.round_id}, sent by "
                    f"{participant} for {round_id}"
                )
        except StatementError as error:
            raise SealError(
                f"its release is not to be believed: {error}; if the participant has a new "
                f"release-key.pem, the operator removes {SENDERS}/{participant}.pem"
            ) from error
        opened = open_file(path, out, self._opener(read_header(path).recipient))
        if (opened.sha256, opened.header.size_bytes) != (release.sha256, release.size_bytes):
            out.unlink()
            raise SealError("the file inside is not the one that was released: send it again")
        if known is None:
            save_public(key, self._sender(participant))
        return release

    def _opener(self, recipient: str) -> Opener:
        """The key that a file is sealed to, read anew: it may have been rotated; else today's."""
        retired = self.folder / RETIRED / f"{recipient}.pem"
        try:
            return load_opener(retired if retired.exists() else self.folder / PRIVATE_FILE)
        except KeyFileError as error:
            raise SealError(str(error)) from error

    def _known(self, participant: str) -> Ed25519PublicKey | None:
        path = self._sender(participant)
        try:
            return load_public(path) if path.exists() else None
        except KeyFileError as error:
            raise SealError(str(error)) from error

    def _sender(self, participant: str) -> Path:
        return self.folder / SENDERS / f"{participant}.pem"


def is_sealed(path: Path) -> bool:
    """Whether it begins as sealed files do; contributions of older releases do not."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC
