"""Every pivot has a manifest that counts today, and says of the pivot what it said at first."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import time_machine
from safetensors.numpy import save_file

from coordinator.artifacts import Artifacts
from coordinator.rounds import Event
from coordinator.signing import SIGNER_KEY, Signer, ensure_key, own_scores
from coordinator.store import PivotRow, Store
from protos.chunks import sha256_of
from protos.errors import CofuseError
from protos.messages import FileRef
from trust.keys import kid, load_public
from trust.pivot_manifest import LIFETIME, MANIFEST_FILE, SIGNER_FILE, Manifest, moment_of

EVALS = {"pivot": "unified", "bpb": {"base": {"a": 2.0}, "unified": {"a": 1.23456789}}}


class Hub:
    """A coordinator's store and artifacts, with pivots as an older release left them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = Store.at(root / "store.sqlite")
        self.artifacts = Artifacts(root / "artifacts")
        self.signer = self.start()

    def start(self) -> Signer:
        key = ensure_key(self.root / "tls" / "key.pem", self.root / "ca.pem")
        return Signer(self.store, self.artifacts, key)

    def keep(self, name: str, content: bytes) -> FileRef:
        path = self.root / name
        path.write_bytes(content)
        reference = FileRef(name=name, sha256=sha256_of(path), size_bytes=len(content))
        self.artifacts.add(path, reference.sha256)
        return reference

    def files(self, value: float) -> tuple[FileRef, ...]:
        save_file({"w": np.full(2, value)}, self.root / "weights", metadata={"format": "pt"})
        return (self.keep("model.safetensors", (self.root / "weights").read_bytes()),)

    def unsigned(self, name: str, parent: str = "", round_id: str = "") -> None:
        self.store.add_pivot(
            name=name,
            parent=parent,
            round_id=round_id,
            files=self.files(float(name[-1])),
            evals_json=json.dumps(EVALS),
        )

    def published(self) -> str:
        """pivot-1, made in a round by two participants."""
        asked = {"kind": "logits", "method": "unified", "participants": ["ada", "bob"]}
        spec = json.dumps({"pivot": "pivot-0", **asked})
        row = self.store.submit_round(
            request_id="r", submitted_by="x", spec_json=spec, deadline_ms=3_600_000
        )
        for event in (Event.APPROVE, Event.ISSUE):
            self.store.advance(row.round_id, event)
        self.store.commit(row.round_id, "ada", "a" * 64, 3)
        self.store.commit(row.round_id, "bob", "b" * 64, 4)
        self.unsigned("pivot-1", "pivot-0", row.round_id)
        return row.round_id

    def manifest(self, name: str) -> Manifest:
        found = self.signer.manifest(self.store.pivot(name))
        assert found is not None
        return found


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub(tmp_path)
    hub.unsigned("pivot-0")
    return hub


def test_the_key_is_made_once_and_its_public_half_lies_beside_the_authority(hub: Hub) -> None:
    key = hub.root / "tls" / SIGNER_KEY
    before = key.read_bytes(), (hub.root / SIGNER_FILE).read_bytes()
    (hub.root / SIGNER_FILE).unlink()
    again = hub.start()
    assert (key.read_bytes(), (hub.root / SIGNER_FILE).read_bytes()) == before
    assert again.kid == hub.signer.kid == kid(load_public(hub.root / SIGNER_FILE))


def test_pivots_of_an_older_release_are_signed_once_with_all_that_is_known(hub: Hub) -> None:
    round_id = hub.published()
    hub.signer.renew()
    rows = hub.store.pivots()
    hub.signer.renew()
    assert hub.store.pivots() == rows
    first, second = hub.manifest("pivot-0"), hub.manifest("pivot-1")
    assert (first.method, first.parent, first.root) == ("import", None, "pivot-0")
    assert second.parent is not None
    assert second.parent.content_sha256 == first.content_sha256
    assert (second.method, second.round_id) == ("logits/unified", round_id)
    assert second.root == "pivot-0"
    assert [(part.participant, part.sha256[0]) for part in second.inputs] == [
        ("ada", "a"),
        ("bob", "b"),
    ]
    assert second.evals == {"bpb": {"a": "1.23457"}}
    files = {file.name for file in rows[1].files}
    assert files == {"model.safetensors", MANIFEST_FILE}
    assert {file.name for file in second.files} == {"model.safetensors"}


def test_a_manifest_is_issued_again_in_time_and_says_the_same(hub: Hub) -> None:
    hub.signer.renew()
    first = hub.manifest("pivot-0")
    for days, renewed in ((44, False), (46, True)):
        with time_machine.travel(datetime.now(UTC) + timedelta(days=days)):
            hub.signer.renew()
            found = hub.manifest("pivot-0")
            assert (found.issued > first.issued) == renewed
            assert found.content_sha256 == first.content_sha256
            assert moment_of(found.expires) > datetime.now(UTC) + LIFETIME / 3
    assert len(hub.store.pivot("pivot-0").files) == 2


def test_with_another_key_everything_is_signed_anew(hub: Hub) -> None:
    hub.signer.renew()
    (hub.root / "tls" / SIGNER_KEY).unlink()
    before, hub.signer = hub.signer.kid, hub.start()
    hub.signer.renew()
    assert hub.manifest("pivot-0").signer == hub.signer.kid != before


def test_one_that_cannot_be_signed_does_not_keep_the_others_from_it(hub: Hub) -> None:
    gone = FileRef(name="model.safetensors", sha256="f" * 64, size_bytes=1)
    hub.store.add_pivot(
        name="pivot-5", parent="pivot-9", round_id="", files=[gone], evals_json="{}"
    )
    hub.signer.renew()
    assert hub.manifest("pivot-0").name == "pivot-0"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.safetensors", b"weights", "wanted 8 at least"),
        ("config.json", b'{"auto_map": {}}', "code never travels"),
        ("modeling.py", b"import os", "leave it out"),
    ],
)
def test_nothing_is_signed_that_a_receiver_would_refuse(
    hub: Hub, name: str, content: bytes, says: str
) -> None:
    row = PivotRow(
        name="pivot-7",
        parent="",
        round_id="",
        files=(hub.keep(name, content),),
        evals_json="{}",
        created_unix_ms=0,
    )
    with pytest.raises(CofuseError, match=says):
        hub.signer.sign(row)


def test_a_name_twice_is_not_signed(hub: Hub) -> None:
    row = hub.store.pivot("pivot-0")
    twice = replace(row, files=(*row.files, *hub.files(8.0)))
    with pytest.raises(CofuseError, match="comes twice"):
        hub.signer.sign(twice)


def test_the_way_back_is_a_new_number_with_the_old_files(hub: Hub) -> None:
    hub.published()
    made = hub.signer.roll_back("pivot-1")
    assert hub.signer.roll_back("pivot-1") == made
    assert [row.name for row in hub.store.pivots()] == ["pivot-0", "pivot-1", made.name]
    assert made.name == "pivot-2"
    back, first = hub.manifest("pivot-2"), hub.manifest("pivot-0")
    assert back.files == first.files
    assert (back.method, back.restores) == ("rollback", "pivot-0")
    assert back.parent is not None
    assert back.parent.name == "pivot-1"
    assert back.version > hub.manifest("pivot-1").version
    with pytest.raises(CofuseError, match="nothing to go back to"):
        hub.signer.roll_back("pivot-0")
    with pytest.raises(CofuseError, match="no pivot 'pivot-8'"):
        hub.signer.roll_back("pivot-8")


def test_storing_a_pivot_again_with_a_later_manifest_changes_nothing(hub: Hub) -> None:
    hub.signer.renew()
    row = hub.store.pivot("pivot-0")
    with time_machine.travel(datetime.now(UTC) + timedelta(days=1)):
        files = hub.signer.sign(row)
    assert files != row.files
    same = {"name": row.name, "parent": "", "round_id": "", "evals_json": row.evals_json}
    assert hub.store.add_pivot(**same, files=files) == row
    with pytest.raises(CofuseError, match="other files"):
        hub.store.add_pivot(**same, files=hub.files(9.0))


def test_only_the_pivots_own_scores_are_signed() -> None:
    assert own_scores(EVALS) == {"bpb": {"a": "1.23457"}}
    assert own_scores({}) == {}
