"""Promises of the loop: what is stored goes on after any end, and what is over ends.

The engine here delivers within the process; store, artifacts and fusion workers are the real ones.
"""

import contextlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest
import time_machine

from coordinator import fuse_job, rounds
from coordinator import scheduler as scheduler_module
from coordinator.artifacts import Artifacts
from coordinator.engine import EngineError, Reply
from coordinator.happenings import Lost
from coordinator.presence import Presence
from coordinator.rounds import Event, State
from coordinator.scheduler import Scheduler
from coordinator.signing import Signer
from coordinator.store import Store
from fusion.extract import extract_to_file
from fusion.models import ModelSpec, build_model, load_model, save_model
from fusion.models import train_tokenizer as make_tokenizer
from protos.chunks import sha256_of
from protos.messages import Assignment, FileRef, Report
from protos.public_sets import Prompt, write_prompts
from tests.coordinator.test_fuse_worker import spec
from tests.coordinator.test_presence import seen
from trust.keys import new_key

TEXTS = [f"Code I{n} is infarction of part {n}, left side." for n in range(8)]
TRAINING = {"steps": 200, "lr": 0.001, "batch_size": 2, "seq_len": 16, "warmup_steps": 0}
NODES = {"ada": 1, "bob": 2, "cyd": 3}
Answer = Callable[[str, Assignment], Reply | None]


@dataclass
class LoopEngine:
    """Hands each message to `answer`; None is a participant that keeps silent."""

    answer: Answer
    sent: list[tuple[str, int]] = field(default_factory=list)
    """Who was asked, and under which attempt."""

    def deliver(
        self,
        assignments: Mapping[int, str],
        *,
        on_reply: Callable[[int, Reply], None],
        stop: threading.Event,
        deadline_s: float,
        idle_s: Callable[[int], float],
    ) -> None:
        names = {node: name for name, node in NODES.items()}
        silent = False
        for node, payload in assignments.items():
            assignment = Assignment.model_validate_json(payload)
            self.sent.append((names[node], assignment.attempt))
            reply = self.answer(names[node], assignment)
            silent |= reply is None
            if reply is not None:
                on_reply(node, reply)
        if silent:
            stop.wait(deadline_s)


@dataclass
class Place:
    """One coordinator's disk, and files for a tiny round."""

    root: Path
    public: Path

    def __post_init__(self) -> None:
        self.store = Store.at(self.root / "store.sqlite")
        self.presence = Presence(lambda _: ())
        self.artifacts = Artifacts(self.root / "artifacts")
        key = self.root / "key.pem"
        if not key.exists():
            new_key(key)
        self.signer = Signer(self.store, self.artifacts, key)
        for name, node in NODES.items():
            self.store.upsert_participant(name, node, b"key")
        files = [self.keep(path) for path in sorted((self.public / "pivot").iterdir())]
        self.store.add_pivot(name="pivot-0", parent="", round_id="", files=files, evals_json="{}")

    def keep(self, path: Path) -> FileRef:
        reference = FileRef(name=path.name, sha256=sha256_of(path), size_bytes=path.stat().st_size)
        self.artifacts.add(path, reference.sha256)
        return reference

    def submit(self, participants: tuple[str, ...] = ("ada", "bob"), **change: Any) -> str:
        pinned = {
            name: f"sha256:{self.keep(self.public / file).sha256}"
            for name, file in (("prompts", "prompts.jsonl"), ("evals", "evals.json"))
        }
        asked = spec(participants=participants, **pinned, **change)
        row = self.store.submit_round(
            request_id=str(len(self.store.rounds())),
            submitted_by="ada",
            spec_json=asked.model_dump_json(),
            deadline_ms=int(asked.deadline_minutes * 60_000),
        )
        return self.store.advance(row.round_id, Event.APPROVE).round_id

    def contribute(self, name: str, assignment: Assignment) -> Reply:
        """What an honest participant does."""
        file = self.keep(self.public / f"{name}.logits")
        self.store.commit(assignment.round_id, name, file.sha256, file.size_bytes)
        return report(assignment, "committed")

    @contextlib.contextmanager
    def scheduler(self, engine: LoopEngine) -> Iterator[Scheduler]:
        parts = self.root, self.store, self.artifacts, engine, self.presence, self.signer.sign
        scheduler = Scheduler(*parts, fuse_workers=1)  # type: ignore[arg-type]
        loop = threading.Thread(target=scheduler.run)
        loop.start()
        try:
            yield scheduler
        finally:
            scheduler.stop()
            loop.join(timeout=30)
            assert not loop.is_alive()

    def wait(self, happened: Callable[[], Any], seconds: float = 240) -> Any:
        """Wait for news of the store until `happened` is true; return what it returned."""
        end = time.monotonic() + seconds
        while not (found := happened()):
            assert time.monotonic() < end, [r.state + r.detail for r in self.store.rounds()]
            with self.store.changed:
                self.store.changed.wait(0.1)
        return found

    def wait_for(self, round_id: str, *states: State) -> None:
        self.wait(lambda: self.store.round(round_id).state in states)


def report(assignment: Assignment, status: Any, detail: str = "") -> Reply:
    told = Report(
        round_id=assignment.round_id, attempt=assignment.attempt, status=status, detail=detail
    )
    return Reply(told.model_dump_json())


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("public")
    for seed, name in enumerate(("pivot", "ada", "bob")):
        tokenizer = make_tokenizer(TEXTS, 290 + seed)
        shape = ModelSpec(
            architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
        )
        save_model(build_model(shape, seed), tokenizer, folder / name)
    write_prompts(folder / "prompts.jsonl", [Prompt(text=text) for text in TEXTS])
    domains = {"a": {"documents": ["Code a is known."]}}
    (folder / "evals.json").write_text(json.dumps({"domains": domains}))
    for name in ("ada", "bob"):
        extract_to_file(
            folder / f"{name}.logits", *load_model(folder / name), TEXTS, top_k=8,
            prompt_set_sha256=sha256_of(folder / "prompts.jsonl"), model_sha256="a" * 64,
        )  # fmt: skip
    return folder


@pytest.fixture
def place(tmp_path: Path, public: Path) -> Place:
    return Place(tmp_path, public)


def workers() -> list[psutil.Process]:
    """This process's fusion workers, and their children."""
    children = psutil.Process().children(recursive=True)
    return [child for child in children if "coordinator.fuse_worker" in words_of(child)]


def words_of(process: psutil.Process) -> list[str]:
    """Its command line; none when it has ended."""
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []


def progress(place: Place, round_id: str) -> list[Any]:
    return [event for event in place.store.events(round_id) if event.kind == "progress"]


# --- collecting ------------------------------------------------------------------------------


def test_only_named_participants_are_asked_and_a_refusal_ends_the_round_at_once(
    place: Place,
) -> None:
    engine = LoopEngine(lambda name, a: report(a, "refused", "no") if name == "ada" else None)
    with place.scheduler(engine):
        round_id = place.submit()
        place.wait_for(round_id, State.FAILED)
    assert sorted(engine.sent) == [("ada", 1), ("bob", 1)]
    assert "ada refused: no" in place.store.round(round_id).detail


def test_a_restart_asks_again_under_a_new_attempt(place: Place) -> None:
    engine = LoopEngine(lambda *_: None)
    with place.scheduler(engine):
        round_id = place.submit()
        place.wait(lambda: len(engine.sent) == 2)
    with place.scheduler(engine):
        place.wait(lambda: len(engine.sent) == 4)
        assert sorted(engine.sent[2:]) == [("ada", 2), ("bob", 2)]
        place.store.advance(round_id, Event.CANCEL)
    assert len(engine.sent) == 4


def test_a_lost_message_is_sent_again_and_the_others_are_left_alone(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "RETRY_MS", 1)
    engine = LoopEngine(
        lambda name, a: Reply(None, "no content") if (name, a.attempt) == ("ada", 1) else None
    )
    with place.scheduler(engine):
        round_id = place.submit()
        place.wait(lambda: len(engine.sent) == 3)
        place.store.step(round_id, Lost("ada", 2, "its node restarted"))
        place.wait(lambda: len(engine.sent) == 4)
    assert sorted(engine.sent) == [("ada", 1), ("ada", 2), ("ada", 3), ("bob", 1)]


def test_who_works_by_its_beats_is_not_asked_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler_module, "HEAR_S", 0.0)
    monkeypatch.setattr(rounds, "ASSIGNMENT_LEASE_MS", 2_000)
    noted: list[tuple[str, str]] = []
    monkeypatch.setattr(place.store, "note_expert", lambda *what: noted.append(what))
    engine = LoopEngine(lambda *_: None)
    place.presence.arrive("ada", lambda: None)
    with place.scheduler(engine):
        round_id = place.submit()
        place.wait(lambda: len(engine.sent) == 2)
        place.presence.beat("ada", seen(working=[round_id]))
        place.wait(lambda: ("bob", 3) in engine.sent)
    assert ("ada", 2) not in engine.sent
    assert noted == [("ada", "1/1")]


def test_an_engine_that_gives_up_costs_time_only(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "RETRY_MS", 1)

    def answer(name: str, assignment: Assignment) -> Reply:
        if assignment.attempt == 1:
            raise EngineError("the run has ended")
        return report(assignment, "refused", "no")

    with place.scheduler(LoopEngine(answer)):
        round_id = place.submit()
        place.wait_for(round_id, State.FAILED)
    assert "refused: no" in place.store.round(round_id).detail


def test_a_round_that_cannot_be_asked_for_fails_loudly(place: Place) -> None:
    with place.scheduler(LoopEngine(lambda *_: None)):
        round_id = place.submit(pivot="pivot-7")
        place.wait_for(round_id, State.FAILED)
    assert "no pivot 'pivot-7'" in place.store.round(round_id).detail


def test_a_round_ends_at_its_deadline_whatever_it_waits_for(place: Place) -> None:
    with place.scheduler(LoopEngine(lambda *_: None)):
        begun = time.monotonic()
        round_id = place.submit(deadline_minutes=1 / 60)
        place.wait_for(round_id, State.EXPIRED)
        assert time.monotonic() - begun < 30  # the deadline was one second
    assert "no answer from ada, bob" in place.store.round(round_id).detail


def test_a_wall_clock_that_jumps_ends_no_round_and_is_told(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    engine = LoopEngine(lambda *_: None)
    with place.scheduler(engine):
        round_id = place.submit()
        place.wait(lambda: len(engine.sent) == 2)
        with time_machine.travel(datetime.now(UTC) + timedelta(days=1)):
            place.wait(lambda: "the wall clock has moved by" in caplog.text, 20)
    assert place.store.round(round_id).state is State.COLLECTING
    assert len(engine.sent) == 2


# --- fusing ----------------------------------------------------------------------------------


def test_a_killed_worker_is_followed_by_another_which_a_cancel_ends(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "RETRY_MS", 1)
    with place.scheduler(LoopEngine(place.contribute)):
        round_id = place.submit(training={**TRAINING, "steps": 20_000})
        place.wait(lambda: progress(place, round_id))
        first = workers()
        first[0].send_signal(signal.SIGKILL)
        second = place.wait(lambda: set(workers()) - set(first))
        place.wait(lambda: not any(words_of(process) for process in first), 5)
        place.store.advance(round_id, Event.CANCEL)
        place.wait(lambda: not any(words_of(process) for process in second), 5)
    assert place.store.round(round_id).state is State.CANCELLED
    assert [row.name for row in place.store.pivots()] == ["pivot-0"]
    assert any("worker 2 follows" in e.body_json for e in place.store.events(round_id))
    assert not list((place.root / "jobs").glob("rnd-*")), "the folder of an ended round stays"


@pytest.mark.slow
def test_a_round_whose_worker_was_killed_is_published_once(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "RETRY_MS", 1)
    with place.scheduler(LoopEngine(place.contribute)):
        round_id = place.submit(training=TRAINING)
        place.wait(lambda: progress(place, round_id))
        workers()[0].send_signal(signal.SIGKILL)
        place.wait_for(round_id, State.PUBLISHED)
    assert place.store.core(round_id).attempt == 2
    assert [row.name for row in place.store.pivots()] == ["pivot-0", "pivot-1"]
    files = {file.name: file.sha256 for file in place.store.pivot("pivot-1").files}
    lineage = json.loads(place.artifacts.path(files["lineage.json"]).read_text())
    assert lineage["contributions"].keys() == {"ada", "bob"}


@pytest.mark.slow
def test_a_worker_that_hangs_is_ended_and_followed_by_another(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "FUSION_LEASE_MS", 8_000)
    monkeypatch.setattr(fuse_job, "BEAT_S", 1.0)
    with place.scheduler(LoopEngine(place.contribute)):
        round_id = place.submit(training=TRAINING)
        place.wait(lambda: progress(place, round_id))
        for process in workers():
            process.send_signal(signal.SIGSTOP)
        place.wait_for(round_id, State.PUBLISHED)
    assert place.store.core(round_id).attempt == 2


@pytest.mark.slow
def test_a_restart_during_fusing_goes_on_and_publishes_once(place: Place) -> None:
    with place.scheduler(LoopEngine(place.contribute)):
        round_id = place.submit(training=TRAINING)
        place.wait(lambda: progress(place, round_id))
    assert not workers()
    with place.scheduler(LoopEngine(place.contribute)):
        place.wait_for(round_id, State.PUBLISHED)
    assert [row.name for row in place.store.pivots()] == ["pivot-0", "pivot-1"]
