"""What nobody needs goes, in its time; what anybody needs stays; what has decayed is found."""

import hashlib
import tempfile
import threading
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from coordinator.artifacts import Artifacts
from coordinator.rounds import Event
from coordinator.store import Store
from coordinator.upkeep import Upkeep, collect_garbage, references, scrub
from protos.messages import FileRef
from protos.spec import RoundSpec, TrainingSpec


def add(store: Artifacts, folder: Path, data: bytes) -> str:
    """Bring a file in; return its digest."""
    source = folder / "source"
    source.write_bytes(data)
    sha256 = hashlib.sha256(data).hexdigest()
    store.add(source, sha256)
    return sha256


class Garbage(RuleBasedStateMachine):
    """Files are put, referred to, released and asked for while the collector runs."""

    files = Bundle("files")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store = Artifacts(Path(self.folder.name), reserve_bytes=0)
        self.needed: set[str] = set()

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule(target=files, data=st.binary(min_size=1, max_size=1))
    def put(self, data: bytes) -> str:
        return add(self.store, Path(self.folder.name), data)

    @rule(file=files)
    def commit(self, file: str) -> None:
        """As the service does: only what is there can be committed."""
        if self.store.has(file):
            self.needed.add(file)

    @rule(file=files)
    def release(self, file: str) -> None:
        self.needed.discard(file)

    @rule(patient=st.booleans(), late=files)
    def collect(self, patient: bool, late: str) -> None:
        """With grace or without; one commit comes after the references were read."""
        before = set(self.needed)

        def referenced() -> set[str]:
            self.commit(late)
            return before

        grace_s = 3600 if patient else -1
        gone = collect_garbage(self.store, referenced, lambda _: None, grace_s=grace_s)
        assert not (patient and gone)

    @invariant()
    def what_is_needed_is_there(self) -> None:
        assert all(self.store.has(file) for file in self.needed)


TestGarbage = Garbage.TestCase
TestGarbage.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)


def test_what_nobody_needs_is_gone_after_two_rounds_of_grace_and_its_rows_too(
    tmp_path: Path,
) -> None:
    store, forgotten = Artifacts(tmp_path, reserve_bytes=0), []
    sha256 = add(store, tmp_path, b"x")
    assert collect_garbage(store, set, forgotten.append) == []
    assert store.has(sha256)
    assert collect_garbage(store, set, forgotten.append, grace_s=-1) == []
    assert [entry.sha256 for entry in store.objects.walk("trash")] == [sha256]
    assert collect_garbage(store, set, forgotten.append, grace_s=-1) == [sha256] == forgotten
    assert not store.has(sha256)


def test_every_pivot_receipt_and_round_keeps_its_files(tmp_path: Path) -> None:
    store = Store.at(tmp_path / "db.sqlite")
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in ("w", "p", "e", "c")}
    file = FileRef(name="model.safetensors", sha256=digests["w"], size_bytes=1)
    store.add_pivot(name="pivot-0", parent="", round_id="", files=[file], evals_json="{}")
    spec = RoundSpec(
        name="a",
        pivot="pivot-0",
        participants=("st-mary",),
        kind="logits",
        method="unified",
        prompts=f"sha256:{digests['p']}",
        evals=f"sha256:{digests['e']}",
        training=TrainingSpec(steps=1, lr=0.1),
    )
    row = store.submit_round(
        request_id="1", submitted_by="r", spec_json=spec.model_dump_json(), deadline_ms=60_000
    )
    store.advance(row.round_id, Event.APPROVE)
    store.advance(row.round_id, Event.ISSUE)
    store.commit(row.round_id, "st-mary", digests["c"], 1)
    assert references(store) == set(digests.values())
    store.advance(row.round_id, Event.CANCEL, "enough")
    assert references(store) == set(digests.values())


def test_the_scrubber_finds_each_flipped_bit_and_only_that_file_is_lost(tmp_path: Path) -> None:
    store = Artifacts(tmp_path, reserve_bytes=0)
    digests = [add(store, tmp_path, bytes([n]) * 3000) for n in range(5)]
    path = store.path(digests[2])
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)
    assert scrub(store, threading.Event()) == [digests[2]]
    assert [store.has(d) for d in digests] == [True, True, False, True, True]
    assert [entry.sha256 for entry in store.objects.walk("quarantine")] == [digests[2]]


def test_upkeep_stops_when_told_to(tmp_path: Path) -> None:
    artifacts = Artifacts(tmp_path, reserve_bytes=0)
    upkeep = Upkeep(artifacts, Store.at(tmp_path / "db.sqlite"), tmp_path / "scrubbed")
    upkeep.start()
    upkeep.stop()
    assert (tmp_path / "scrubbed").exists()
