"""A coordinator's data folder with real rows and files, for the tests of fsck and of backups."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from coordinator.artifacts import Artifacts
from coordinator.rounds import Event
from coordinator.store import Store
from protos.messages import FileRef

HOUR_MS = 3_600_000


@dataclass
class Archive:
    """A store, its artifacts, and how to put more into both."""

    folder: Path
    url: str
    store: Store
    artifacts: Artifacts

    @classmethod
    def opened(cls, folder: Path, url: str = "") -> "Archive":
        """What is in a data folder, or a new one."""
        folder.mkdir(exist_ok=True)
        url = url or f"sqlite:///{folder}/coordinator.sqlite"
        return cls(folder, url, Store(url), Artifacts(folder / "artifacts"))

    def put(self, content: bytes) -> str:
        """A file in the artifact store; its digest."""
        digest = hashlib.sha256(content).hexdigest()
        source = self.folder / "source"
        source.write_bytes(content)
        self.artifacts.add(source, digest)
        source.unlink()
        return digest

    def pivot(self, name: str, parent: str, round_id: str) -> None:
        content = f"weights of {name}".encode()
        file = FileRef(name="model.safetensors", sha256=self.put(content), size_bytes=len(content))
        self.store.add_pivot(
            name=name, parent=parent, round_id=round_id, files=[file], evals_json="{}"
        )

    def collecting(self, request_id: str, pivot: str) -> str:
        names = ["st-mary", "st-luke"]
        spec = {"pivot": pivot, "prompts": f"sha256:{self.put(b'prompts')}", "evals": None}
        round_id = self.store.submit_round(
            request_id=request_id,
            submitted_by="ada",
            spec_json=json.dumps(spec | {"participants": names}),
            deadline_ms=HOUR_MS,
        ).round_id
        for event in (Event.APPROVE, Event.ISSUE):
            self.store.advance(round_id, event)
        return round_id

    def contribute(self, round_id: str, participant: str) -> str:
        content = f"logits of {participant} for {round_id}".encode()
        digest = self.put(content)
        self.store.commit(round_id, participant, digest, len(content))
        return digest

    def published(self, request_id: str, pivot: str) -> str:
        round_id = self.collecting(request_id, pivot)
        for participant in ("st-mary", "st-luke"):
            self.contribute(round_id, participant)
        row = self.store.advance(round_id, Event.COLLECTED)
        self.store.advance(round_id, Event.FUSED)
        self.pivot(row.pivot_name, pivot, round_id)
        self.store.advance(round_id, Event.EVALUATED)
        return row.pivot_name


def make_archive(folder: Path, url: str = "") -> Archive:
    """Two published rounds, and one that collects with one receipt given."""
    archive = Archive.opened(folder, url)
    archive.pivot("pivot-0", "", "")
    second = archive.published("two", archive.published("one", "pivot-0"))
    archive.contribute(archive.collecting("three", second), "st-mary")
    return archive
