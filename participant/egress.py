"""The record of what left: one line per release, written and synced before the bytes go."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class EgressLog:
    """egress.jsonl, append only."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, *, round_id: str, what: str, size_bytes: int, sha256: str) -> None:
        """Write one release down, durably."""
        line = {
            "time_unix_ms": time.time_ns() // 1_000_000,
            "round": round_id,
            "what": what,
            "size_bytes": size_bytes,
            "sha256": sha256,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> list[Mapping[str, Any]]:
        """Every release so far."""
        if not self._path.exists():
            return []
        return [json.loads(line) for line in self._path.read_text(encoding="utf-8").splitlines()]

    def total_bytes(self) -> int:
        """Bytes released in all."""
        return sum(line["size_bytes"] for line in self.lines())
