"""The coordinator's receipts, signed and kept: what it owes us can be shown to others."""

from pathlib import Path
from typing import Final

from participant.config import ParticipantConfig
from participant.durable import write_durably
from protos.files import flush
from protos.v1 import fleet_pb2 as pb
from trust.keys import KeyFileError, load_public
from trust.pivot_manifest import SIGNER_FILE
from trust.statements import Receipt, StatementError, verify

FOLDER: Final = "receipts"
"""Of the data folder: one signed receipt for each round, `<round>.dsse.json`."""


def keep(config: ParticipantConfig, found: pb.Receipt) -> Path:
    """Write a receipt down if the hub's key has signed all that it says; return the file.

    Raises: StatementError, OSError.
    """
    signer = config.tls.ca.with_name(SIGNER_FILE)
    try:
        receipt = verify(Receipt, found.signed_json, load_public(signer))
    except KeyFileError as error:
        raise StatementError(f"no key to check receipts with: {error}") from error
    says = Receipt(
        sha256=found.sha256,
        round_id=found.round_id,
        participant=config.name,
        size_bytes=found.size_bytes,
        committed_unix_ms=found.committed_unix_ms,
    )
    if receipt != says:
        raise StatementError("the receipt's signature is for another contribution")
    folder = config.data_dir / FOLDER
    if not folder.exists():
        folder.mkdir(parents=True)
        flush(folder.parent)
    path = folder / f"{receipt.round_id}.dsse.json"
    write_durably(path, found.signed_json)
    return path
