"""A console over a real store, without a coordinator around it, and browsers signed in."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from starlette.testclient import TestClient

from coordinator.admission import Members
from coordinator.artifacts import Artifacts
from coordinator.config import ConsoleConfig, CoordinatorConfig
from coordinator.console.app import build
from coordinator.console.desk import Desk
from coordinator.console.news import News
from coordinator.orders import Orders
from coordinator.presence import Seen
from coordinator.research_service import ResearchService
from coordinator.revocations import Revocations
from coordinator.rounds import Event
from coordinator.signing import Signer
from coordinator.store import Store
from protos.config import TlsConfig
from protos.messages import FileRef
from trust.ca import create_authority
from trust.keys import new_key

PASSWORD = "correct horse battery"
SPEC = {
    "name": "first",
    "purpose": "trial",
    "pivot": "pivot-0",
    "participants": ["north", "st-mary"],
    "kind": "logits",
    "method": "unified",
    "training": {"steps": 5, "batch_size": 8, "seq_len": 128, "lr": 0.001},
    "seed": 0,
}
EVALS = {
    "pivot": "unified",
    "bpb": {
        "base": {"cardio": 3.0, "neuro": 3.2},
        "expert:north": {"cardio": 3.5, "neuro": 1.5},
        "unified": {"cardio": 2.0, "neuro": 2.1},
    },
    "accuracy": {},
    "credit": {"share": {"all": {"base": 0.25, "north": 0.75}}},
}


@dataclass
class World:
    """What stands behind the pages."""

    desk: Desk
    app: Any
    seen: dict[str, Seen | None] = field(default_factory=dict)
    numbers: int = 0

    @property
    def store(self) -> Store:
        return self.desk.store

    def browser(self, name: str = "") -> TestClient:
        """One that has signed in as a user, or not yet."""
        client = TestClient(
            self.app,
            base_url="http://127.0.0.1:8080",
            headers={"origin": "http://127.0.0.1:8080"},
            follow_redirects=False,
            raise_server_exceptions=False,
        )
        if name:
            answer = client.post("/login", data={"name": name, "password": PASSWORD})
            assert answer.status_code == 303, answer.text
        return client

    def round(self, by: str = "ada", **changes: Any) -> str:
        """A submitted round."""
        self.numbers += 1
        return self.store.submit_round(
            request_id=f"r{self.numbers}",
            submitted_by=by,
            spec_json=json.dumps({**SPEC, **changes}),
            deadline_ms=3_600_000,
        ).round_id

    def collecting(self, **changes: Any) -> str:
        """A round that waits for contributions, as the scheduler makes it."""
        round_id = self.round(**changes)
        self.store.advance(round_id, Event.APPROVE)
        self.store.advance(round_id, Event.ISSUE)
        return round_id

    def pivot(self, name: str, content: bytes, *, evals: Any = None, card: str = "") -> None:
        """An imported pivot with its files."""
        files = []
        for file, raw in {"model.safetensors": content, "README.md": card.encode()}.items():
            path = self.desk.config.data_dir / file
            path.write_bytes(raw)
            digest = hashlib.sha256(raw).hexdigest()
            self.desk.artifacts.add(path, digest)
            files.append(FileRef(name=file, sha256=digest, size_bytes=len(raw)))
        text = json.dumps(evals or {})
        self.store.add_pivot(name=name, parent="", round_id="", files=files, evals_json=text)


def post(client: TestClient, address: str, page: str = "/participants", **fields: str) -> Any:
    """Send a form with the token of a page, as a browser would."""
    token = re.search(r'name="form" value="([^"]+)"', client.get(page).text)
    assert token is not None
    return client.post(address, data={"form": token[1], **fields})


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("authority")
    create_authority(folder / "ca", "test")
    new_key(folder / "signer.key")
    return folder


@pytest.fixture
def world(tmp_path: Path, authority: Path) -> Iterator[World]:
    """Users: grace, an operator; ada and bob, researchers."""
    ca = authority / "ca" / "ca.pem"
    config = CoordinatorConfig(
        data_dir=tmp_path,
        enroll_listen="127.0.0.1:7444",
        authority=authority / "ca",
        console=ConsoleConfig(),
        tls=TlsConfig(ca=ca, certificate=ca, key=ca),
    )
    store, artifacts = Store.at(tmp_path / "db.sqlite"), Artifacts(tmp_path / "artifacts")
    seen: dict[str, Seen | None] = {}
    signer = Signer(store, artifacts, authority / "signer.key")
    research = ResearchService(
        store, artifacts, signer, Orders(ca), auto_approve=False, attending=lambda: seen
    )
    desk = Desk(
        config=config,
        store=store,
        artifacts=artifacts,
        research=research,
        attending=lambda: seen,
        members=Members(Revocations(store.database)),
    )
    # argon2 as in production costs 50 ms a time.
    desk.users._hasher = cheap_hasher()
    for name, role in (("grace", "operator"), ("ada", "researcher"), ("bob", "researcher")):
        desk.users.add(name, role, PASSWORD)  # type: ignore[arg-type]
    for name in ("north", "st-mary"):
        store.upsert_participant(name, 1, b"key")
    yield World(desk, build(desk, News(store)), seen)
    store.close()


def cheap_hasher() -> Any:
    return PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
