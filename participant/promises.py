"""What a participant promised of its budget and its plain files, held against its folder.

The audit chain names every release; the ledger is a file that somebody may restore from a backup to
have a budget again. So the chain is believed: what left is in the ledger, or nothing more leaves.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from participant.budget import FILE, Ledger, Reserved
from participant.egress import INTENT, read_records
from participant.sandbox import SEALED
from trust.seal import MAGIC

CHECKED: Final[Mapping[str, str]] = {
    "I6": "every release on the audit chain is in the budget, which so never grows",
    "I8": "what the process with the network may read is sealed",
}
_COUNTED: Final = frozenset({"logits", "grown", "pairs", "weights"})


@dataclass(frozen=True, slots=True)
class Finding:
    """One promise that does not hold."""

    invariant: str
    says: str
    do: str


def check(data_dir: Path) -> list[Finding]:
    """Check both; reads only, also while the participant serves.

    Raises: AuditError, PolicyRefusalError when chain or budget cannot be read; OSError.
    """
    return [*unbudgeted(data_dir), *_in_the_clear(data_dir / SEALED)]


def unbudgeted(data_dir: Path) -> Iterator[Finding]:
    """I6: releases of the chain that the budget does not know. Raises: as check."""
    entries = Ledger(data_dir / FILE).entries()
    reserved = {one.question.round_id for one in entries if isinstance(one, Reserved)}
    do = f"restore {FILE} as it was last, from a backup no older than the release"
    left = (r["obj"] for r in read_records(data_dir, INTENT) if r["data"]["kind"] in _COUNTED)
    for round_id in dict.fromkeys(left):
        if round_id not in reserved:
            yield Finding("I6", f"{round_id} left and is not in the budget", do)


def _in_the_clear(folder: Path) -> Iterator[Finding]:
    """I8: files among those that may leave which are not sealed."""
    for path in sorted(folder.glob("*")):
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                do = "remove it; the guard makes what is asked for again"
                yield Finding("I8", f"{path} is not sealed", do)
