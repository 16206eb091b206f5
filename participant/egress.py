"""The record of what left: one line per release, written and synced before the bytes go.

A line that a power cut tore was not synced, so its bytes never left: it does not count.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from protos.files import flush


class EgressLog:
    """egress.jsonl, append only."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(
        self,
        *,
        round_id: str,
        what: str,
        size_bytes: int,
        sha256: str,
        rule: str = "",
        approver: str = "policy",
    ) -> None:
        """Write one release down, durably: by which rule of the policy, and who approved it."""
        line = {
            "time_unix_ms": time.time_ns() // 1_000_000,
            "round": round_id,
            "what": what,
            "size_bytes": size_bytes,
            "sha256": sha256,
            "rule": rule,
            "approver": approver,
        }
        fresh = not self._path.exists()
        with self._path.open("a", encoding="utf-8") as file:
            if not fresh and not self._is_whole():
                file.write("\n")
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            flush(self._path.parent)

    def lines(self) -> list[Mapping[str, Any]]:
        """Every release so far."""
        if not self._path.exists():
            return []
        return list(_releases(self._path.read_text(encoding="utf-8")))

    def total_bytes(self) -> int:
        """Bytes released in all."""
        return sum(line["size_bytes"] for line in self.lines())

    def _is_whole(self) -> bool:
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return True
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def _releases(text: str) -> Iterator[Mapping[str, Any]]:
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            yield json.loads(line)
