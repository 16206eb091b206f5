"""Work in hand, on disk: what was accepted is done, and what was made is not made again.

One file per round: the assignment, then the contribution that was made for it, then the report.
Each step is durable before the next one begins, so a power cut costs no more than the step.
"""

from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict, ValidationError

from participant.durable import write_durably
from protos.files import flush
from protos.messages import Assignment, Report

KEEP: Final = 64
"""Answered rounds that are remembered, in case the coordinator asks again."""


class Made(BaseModel):
    """A contribution that lies in the outbox, complete and synced."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    sha256: str
    size_bytes: int
    gates: str = ""
    """What the canary gate measured of it, in words; empty where the gate is off."""


class Entry(BaseModel):
    """One round's work."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    assignment: Assignment
    made: Made | None = None
    report: Report | None = None

    @property
    def round_id(self) -> str:
        """The round it is for."""
        return self.assignment.round_id


class Spool:
    """The folder of entries. Not for two processes: the daemon holds a lock."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        flush(folder.parent)
        self._entries = {entry.round_id: entry for entry in self._read()}

    def accept(self, assignment: Assignment) -> Entry:
        """Take work on; the same work under a new attempt is taken up where it stands."""
        known = self._entries.get(assignment.round_id)
        entry = Entry(assignment=assignment)
        if known is not None and _same_work(known.assignment, assignment):
            entry = known.model_copy(update={"assignment": assignment})
        return self._keep(entry)

    def made(self, entry: Entry, outbox_file: Path, sha256: str, gates: str = "") -> Entry:
        """Remember the contribution, once it is on the disk itself."""
        flush(outbox_file)
        flush(outbox_file.parent)
        size = outbox_file.stat().st_size
        made = Made(file=outbox_file.name, sha256=sha256, size_bytes=size, gates=gates)
        return self._update(entry, {"made": made})

    def answer(self, entry: Entry, report: Report) -> Entry:
        """Remember what is reported; the work is done."""
        kept = self._update(entry, {"report": report})
        answered = [one for one in self._entries.values() if one.report is not None]
        for old in answered[:-KEEP]:
            self.drop(old.round_id)
        return kept

    def drop(self, round_id: str) -> None:
        """Forget a round."""
        if self._entries.pop(round_id, None) is not None:
            self._path(round_id).unlink(missing_ok=True)
            flush(self._folder)

    def get(self, round_id: str) -> Entry | None:
        """One round's work, if it is known."""
        return self._entries.get(round_id)

    def unfinished(self) -> list[Entry]:
        """Work that is not answered yet, oldest first."""
        return [entry for entry in list(self._entries.values()) if entry.report is None]

    def _update(self, entry: Entry, news: dict[str, Made | Report]) -> Entry:
        """Add to the work as it stands now: a new attempt, or other work, may have come in."""
        now = self._entries.get(entry.round_id, entry)
        if not _same_work(now.assignment, entry.assignment):
            return now
        return self._keep(now.model_copy(update=news))

    def _keep(self, entry: Entry) -> Entry:
        write_durably(self._path(entry.round_id), entry.model_dump_json())
        self._entries.pop(entry.round_id, None)
        self._entries[entry.round_id] = entry
        return entry

    def _path(self, round_id: str) -> Path:
        return self._folder / f"{round_id}.json"

    def _read(self) -> list[Entry]:
        paths = sorted(self._folder.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        found = []
        for path in paths:
            try:
                found.append(Entry.model_validate_json(path.read_text(encoding="utf-8")))
            except ValidationError:  # of another version of this program: it will be asked again
                path.rename(path.with_suffix(".unreadable"))
        return found


def _same_work(one: Assignment, other: Assignment) -> bool:
    """Whether two assignments differ in their attempt alone."""
    return one.model_copy(update={"attempt": other.attempt}) == other
