"""The record of what left, on the participant's audit chain: written and synced before bytes go.

An intent comes before every release, with the rule that allowed it and who approved; a refusal is
a record too, and so is the coordinator's receipt. Intents may outnumber what left, never the other
way round: a crash between record and release over-counts.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from participant.durable import write_durably
from protos.files import flush
from trust.anchors import Anchor, acceptance, anchor_entry, is_head, witness
from trust.audit import AuditLog
from trust.audit_files import read_lines, segments
from trust.ca import Identity
from trust.chain import START, AuditError, Entry, Head, read_record, utc

_LOG = logging.getLogger(__name__)
FOLDER: Final = "audit"
"""Of the data folder: what `cofuse audit verify` reads."""
ANCHOR: Final = "coordinator-head.json"
"""Of the data folder: the last head that was seen of the coordinator's chain."""
OLD_LOG: Final = "egress.jsonl"
"""What releases before the chain were written to; its lines are taken over once."""
BY_POLICY: Final = "policy"
"""The approver of what nobody had to be asked for."""
INTENT: Final = "release.intent"
REFUSED: Final = "release.refused"
DELIVERED: Final = "release.delivered"
POLICY: Final = "policy.loaded"
CHECKED: Final = "doctor.checked"
_TAKEN_OVER: Final = "release.taken_over"


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """One release that was let out, or one that was not."""

    seq: int
    """Number of its record."""
    time: str
    """RFC 3339, UTC."""
    round: str
    what: str
    """The kind: logits, weights, report."""
    size_bytes: int
    sha256: str
    allowed: bool
    rule: str
    """Of the policy: the one that allowed it, or the words of the refusal."""
    approver: str
    gates: str = ""
    """What the canary gate measured of it; empty where it is off."""


class EgressLog:
    """Appends to the chain of one data folder."""

    def __init__(self, data_dir: Path, name: str) -> None:
        """Open the chain, or begin it with the lines of an old egress.jsonl.

        Args: name: the participant's own, the actor of its records.
        Raises: AuditError, KeyFileError, OSError.
        """
        self._data_dir = data_dir
        self._actor = Identity("participant", name).uri
        self._log = AuditLog(data_dir / FOLDER, self._actor)
        self._take_over(data_dir / OLD_LOG)
        self._total_bytes = sum(r.size_bytes for r in self.releases() if r.allowed)

    def append(
        self,
        *,
        round_id: str,
        what: str,
        size_bytes: int,
        sha256: str,
        rule: str = "",
        approver: str = BY_POLICY,
        gates: str = "",
    ) -> Head:
        """Write down that bytes are about to leave, durably; they may go when this returns.

        Args: rule: the one of the policy that allows it. approver: who said yes. gates: what the
            canary gate measured.
        Returns: the record, as a receipt's counterpart may name it.
        """
        data = {"kind": what, "size_bytes": size_bytes, "sha256": sha256, "approver": approver}
        data |= {"gates": gates} if gates else {}
        head = self._log.append(self._entry(INTENT, round_id, why=rule, data=data))
        self._total_bytes += size_bytes
        return head

    def refuse(self, *, round_id: str, what: str, why: str) -> None:
        """Write down that something was asked for and does not leave."""
        data = {"kind": what}
        entry = Entry(actor=self._actor, act=REFUSED, obj=round_id, res="deny", why=why, data=data)
        self._log.append(entry)

    def delivered(
        self, *, round_id: str, sha256: str, size_bytes: int, receipt_unix_ms: int
    ) -> None:
        """Write down the coordinator's receipt for a contribution."""
        data = {"sha256": sha256, "size_bytes": size_bytes, "receipt_unix_ms": receipt_unix_ms}
        self._log.append(self._entry(DELIVERED, round_id, data=data))

    def policy(self, sha256: str) -> None:
        """Write down which policy rules from now on; the same as before is no news."""
        before = [record["obj"] for record in read_records(self._data_dir, POLICY)]
        if before[-1:] != [sha256]:
            self._log.append(self._entry(POLICY, sha256))

    def checked(self, *, tried: int, broken: Sequence[str], not_enforceable: Sequence[str]) -> None:
        """Write down how `cofuse doctor` found the walls between the participant's processes."""
        data = {"tried": tried, "broken": broken, "not_enforceable": not_enforceable}
        res: Literal["ok", "deny"] = "deny" if broken else "ok"
        self._log.append(Entry(actor=self._actor, act=CHECKED, obj="processes", res=res, data=data))

    def anchor(self) -> Head:
        """The head of the chain, for others to remember; it is signed when that is due.

        Trouble with the disk or the chain ends no beat: whoever releases next is told of it.
        """
        try:
            return self._log.sign_if_due()
        except (OSError, AuditError) as error:
            _LOG.warning("the head of the audit chain is not told: %s", error)
            return START

    def witness(self, head: Head) -> None:
        """Remember the head of the coordinator's chain, and raise the alarm when it went back."""
        if not is_head(*head):
            return
        before = read_anchor(self._data_dir)
        after, is_due = witness(before, head, time.time_ns() // 1_000_000)
        if after.alarm and (before is None or after.alarm != before.alarm):
            _LOG.critical("the coordinator: %s; ask its operator why", after.alarm)
        try:
            if is_due:
                self._log.append(anchor_entry(self._actor, "coordinator", before, after))
            if after != before:
                write_durably(self._data_dir / ANCHOR, json.dumps(asdict(after)))
        except (OSError, AuditError) as error:  # a full disk must not end the attendance
            _LOG.warning("the coordinator's audit chain was not noted: %s", error)

    def alarm(self) -> str:
        """What the coordinator's chain did that no chain does; empty: nothing."""
        seen = read_anchor(self._data_dir)
        return f"the coordinator: {seen.alarm}" if seen is not None and seen.alarm else ""

    def accept(self, why: str) -> bool:
        """End the alarm about the coordinator's chain; return whether there was one."""
        before = read_anchor(self._data_dir)
        if before is None or not before.alarm:
            return False
        self._log.append(acceptance(self._actor, "coordinator", before, why))
        write_durably(self._data_dir / ANCHOR, json.dumps(asdict(replace(before, alarm=""))))
        return True

    def close(self) -> None:
        """Sign what is not signed yet; on a full disk the next start does it."""
        try:
            self._log.sign()
        except (OSError, AuditError) as error:
            _LOG.warning("the end of the audit chain is not signed: %s", error)

    def releases(self) -> list[Release]:
        """Everything that ever left, and everything that was refused."""
        return list(releases(self._data_dir))

    def total_bytes(self) -> int:
        """Bytes released in all."""
        return self._total_bytes

    def _entry(
        self, act: str, obj: str, *, why: str = "", data: Mapping[str, Any] | None = None
    ) -> Entry:
        return Entry(actor=self._actor, act=act, obj=obj, why=why, data=data or {})

    def _take_over(self, old: Path) -> None:
        """Put the lines of an older release's log on the chain, each once, and lay it aside."""
        if not old.exists():
            return
        have = sum(1 for _ in read_records(self._data_dir, _TAKEN_OVER))
        lines = list(_old_lines(old.read_text(encoding="utf-8")))[have:]
        self._log.append(*(self._entry(_TAKEN_OVER, old.name, data=line) for line in lines))
        old.rename(old.with_suffix(".jsonl.taken-over"))
        flush(old.parent)


def read_anchor(data_dir: Path) -> Anchor | None:
    """The last head that was seen of the coordinator's chain."""
    path = data_dir / ANCHOR
    return Anchor(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def releases(data_dir: Path) -> Iterator[Release]:
    """Everything that ever left a data folder, and was refused; reads only, also while it serves.

    What the chain is worth is for `cofuse audit verify` to say.
    Raises: AuditError for a line that is no record.
    """
    for record in read_records(data_dir, INTENT, REFUSED, _TAKEN_OVER):
        data, old = record["data"], record["act"] == _TAKEN_OVER
        yield Release(
            seq=record["seq"],
            time=record["ts"] if not old else utc(int(data.get("time_unix_ms", 0))),
            round=record["obj"] if not old else str(data.get("round", "")),
            what=str(data.get("what" if old else "kind", "")),
            size_bytes=int(data.get("size_bytes", 0)),
            sha256=str(data.get("sha256", "")),
            allowed=record["res"] == "ok",
            rule=record["why"],
            approver=str(data.get("approver", "")),
            gates=str(data.get("gates", "")),
        )


def read_records(data_dir: Path, *acts: str) -> Iterator[Mapping[str, Any]]:
    """The records of some acts, in order.

    Raises: AuditError.
    """
    for line in read_lines(segments(data_dir / FOLDER)):
        record = read_record(line)
        if record["act"] in acts:
            yield record


def _old_lines(text: str) -> Iterator[dict[str, Any]]:
    """Lines as they were written; one that a power cut tore was not synced: nothing left by it."""
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            found = json.loads(line)
            if isinstance(found, dict):
                yield found
