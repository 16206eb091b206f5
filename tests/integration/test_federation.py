"""A federation of real processes: nothing private leaves, and a killed coordinator goes on.

One small federation serves all tests of this file: two hospitals, a logits round whose fusion is
cut by a SIGKILL of the coordinator, then a weights round that one policy refuses.
"""

import hashlib
import json
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.phi import files_below, forms, hits, likeliest, plant, secrets
from cofuse.demo.federation import Federation, ParticipantPlan
from cofuse.demo.material import base_job, write_texts
from cofuse.demo.result import DemoPlan
from cofuse.demo.run import round_spec
from cofuse.demo.settings import TINY
from cofuse.sdk import Coordinator, Pivot, Round
from coordinator.artifacts import Artifacts
from coordinator.sealed import Worker, worker_folder
from fusion.models import load_model
from participant.egress import releases
from protos.public_sets import read_prompts
from tests.data.runs import eight_word_runs
from tests.integration.recorder import Recorder
from trust.keys import load_public
from trust.pivot_manifest import MANIFEST_FILE, SIGNER_FILE
from trust.statements import Receipt, verify

pytestmark = pytest.mark.timeout(600)
HOSPITALS = TINY.hospitals[:2]


@dataclass
class Story:
    """What happened, for the tests to look at."""

    work: Path
    logits: Round
    weights: Round
    pivots: dict[str, Pivot]
    downloaded: Path
    told: str
    """Metrics, and every event that a process told."""
    recorders: list[Recorder]
    idle_connections: set[str]
    connections: set[str]
    events: list[dict[str, Any]]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    out = tmp_path_factory.mktemp("federation")
    work = out / "federation"
    work.mkdir()
    settings = replace(TINY, round_steps=40)
    plan = DemoPlan(
        out=out, settings=settings, hospitals=HOSPITALS, rounds=(), seed=3, source="sample"
    )
    heard: list[dict[str, Any]] = []
    with Federation(work, lambda who, message: heard.append({"who": who, **message})) as federation:
        federation.init()
        recorders = [_recorder(work, http2=True), _recorder(work, http2=False)]
        federation.start_coordinator(engine_advertise=recorders[1].address)
        recorders[0].target, recorders[1].target = federation.address, federation.engine_address
        write_texts(plan, work)
        for hospital in HOSPITALS:
            plant(work / "text" / hospital.name / "private.jsonl", hospital.name)
        _start_participants(federation, work, recorders)
        federation.run("pivot-0", "cofuse.demo.base_pivot", [str(base_job(plan, work))])
        federation.wait("pivot-0")
        with federation.connect("operator") as operator:
            operator.import_pivot("pivot-0", work / "pivot-0")
        researcher = federation.connect("researcher")
        _wait(lambda: len(researcher.participants()) == len(HOSPITALS), federation)
        idle = _connections(federation)
        spec = round_spec("logits-unified", plan)
        round_id = researcher.submit(spec, folder=work / "public", request_id="first")
        connections = set(idle)
        with _watched(federation, connections):
            _kill_while_fusing(federation, researcher, round_id, recorders[1].address)
        researcher.close()
        with federation.connect("researcher") as researcher:
            logits = researcher.wait(round_id)
            weights = researcher.wait(
                researcher.submit(round_spec("weights", plan), folder=work / "public")
            )
            downloaded = researcher.download_pivot(logits.pivot_name, out / "pivot")
            pivots = {pivot.name: pivot for pivot in researcher.pivots()}
            events = [event.body for event in researcher.watch(round_id)]
        metrics = _metrics(heard)
        connections |= _connections(federation)
        yield Story(
            work,
            logits,
            weights,
            pivots,
            downloaded,
            metrics + json.dumps(heard),
            recorders,
            idle,
            connections,
            events,
        )
    for recorder in recorders:
        recorder.close()


def _metrics(heard: list[dict[str, Any]]) -> str:
    """What the coordinator tells those who monitor it."""
    address = [one["ops_address"] for one in heard if "ops_address" in one][-1]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=20) as reply:
        return str(reply.read().decode())


def _recorder(work: Path, *, http2: bool) -> Recorder:
    home = work / "coordinator"
    pair = home / "tls" / "certificate.pem", home / "tls" / "key.pem"
    return Recorder(home / "ca" / "ca.pem", pair, http2=http2)


def _start_participants(federation: Federation, work: Path, recorders: list[Recorder]) -> None:
    """Start each hospital behind the recorders: one for our services, one for the engine."""
    for hospital in HOSPITALS:
        home = work / hospital.name
        federation.enrol(hospital.name)
        for recorder in recorders:
            recorder.admit(hospital.name, home / "certificate.pem", home / "key.pem")
        policy = {
            "ship_logits": True,
            "ship_scores": True,
            "ship_weights": hospital is HOSPITALS[0],  # the second one keeps its weights
        }
        plan = ParticipantPlan(
            name=hospital.name,
            corpus=work / "text" / hospital.name / "private.jsonl",
            model=hospital.model,
            training=TINY.expert_training,
            policy=policy,
        )
        federation.start_participant(plan, coordinator=recorders[0].address)


def _kill_while_fusing(
    federation: Federation, researcher: Coordinator, round_id: str, advertise: str
) -> None:
    """SIGKILL the coordinator once its worker trains; start it again on the same ports."""
    for event in researcher.watch(round_id):
        if event.kind == "progress":
            break
    federation.kill("coordinator")
    federation.start_coordinator(engine_advertise=advertise)


def _connections(federation: Federation) -> set[str]:
    """Where the participants' processes are connected to."""
    found = set()
    for hospital in HOSPITALS:
        process = psutil.Process(federation.pid(hospital.name))
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                all_of_it = one.net_connections()
                found |= {
                    f"{c.raddr.ip.removeprefix('::ffff:')}:{c.raddr.port}"
                    for c in all_of_it
                    if c.raddr
                }
                assert not [c for c in all_of_it if c.status == psutil.CONN_LISTEN]
    return found


@contextmanager
def _watched(federation: Federation, connections: set[str]) -> Iterator[None]:
    """Add every connection that is there at some moment of the block."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.5):  # a look costs 50 ms of a core
            connections.update(_connections(federation))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _wait(condition: Any, federation: Federation, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        federation.check()
        assert time.monotonic() < end
        time.sleep(0.2)


# --------------------------------------------------------------------------------------- rounds


def test_a_round_survives_the_kill_of_the_coordinator(story: Story) -> None:
    assert story.logits.state == "PUBLISHED", story.logits.detail
    states = [event["state"] for event in story.events if "state" in event]
    assert states == [
        "SUBMITTED", "APPROVED", "COLLECTING", "FUSING", "EVALUATING", "PUBLISHED",
    ]  # fmt: skip
    committed = [e["participant"] for e in story.events if e.get("status") == "committed"]
    assert sorted(committed) == sorted(hospital.name for hospital in HOSPITALS)


def test_a_policy_that_refuses_is_heard_and_the_round_fails_loudly(story: Story) -> None:
    assert story.weights.state == "FAILED"
    assert "no rule allows weights" in story.weights.detail
    parts = {part.participant: part.status for part in story.weights.contributions}
    assert parts[HOSPITALS[1].name] == "refused"


def test_every_model_of_the_round_is_measured(story: Story) -> None:
    evals = story.pivots[story.logits.pivot_name].evals
    experts = [f"expert:{hospital.name}" for hospital in HOSPITALS]
    assert set(evals["bpb"]) == {"base", "unified", "sft", "infifusion", *experts}
    domains = {hospital.department for hospital in HOSPITALS}
    assert all(set(scores) == domains for scores in evals["bpb"].values())


# --------------------------------------------------------------------------------------- egress


def test_no_private_text_leaves_a_participant(story: Story) -> None:
    """No sentence, and no run of eight words that the public text does not also hold."""
    public = eight_word_runs(read_prompts(story.work / "public" / "prompts.jsonl"))
    for hospital in HOSPITALS:
        texts = read_prompts(story.work / "text" / hospital.name / "private.jsonl")
        wires = [recorder.outbound(hospital.name) for recorder in story.recorders]
        assert all(len(wire) > 1000 for wire in wires)
        wires.append(_opened(story, hospital.name))
        sent = _words(b"\n".join(wires).decode("utf-8", errors="replace"))
        leaked = [run for run in eight_word_runs(texts) - public if run in sent]
        assert not leaked
        sentences = {_words(s) for text in texts for s in text.split(". ") if len(s.split()) >= 4}
        public_text = _words(" ".join(read_prompts(story.work / "public" / "prompts.jsonl")))
        assert not [s for s in sentences if s in sent and s not in public_text]


def test_the_recorder_would_see_a_leak_and_sees_no_contribution(story: Story) -> None:
    """What is said in the open of a sealed file crosses it; what is inside is for the worker."""
    name = HOSPITALS[0].name
    seen, inside = story.recorders[0].outbound(name), _opened(story, name)
    assert b'"suite":"MLKEM768_X25519"' in seen
    assert len(inside) > 10_000
    assert inside[:64] not in seen


def test_every_contribution_has_a_receipt_that_the_hub_signed(story: Story) -> None:
    for hospital in HOSPITALS:
        home = story.work / hospital.name
        sent = next(one.sha256 for one in releases(home / "data") if one.what == "logits")
        raw = (home / "data" / "receipts" / f"{story.logits.round_id}.dsse.json").read_text()
        receipt = verify(Receipt, raw, load_public(home / SIGNER_FILE))
        assert (receipt.sha256, receipt.participant) == (sent, hospital.name)


def test_the_hub_keeps_nothing_in_the_clear(story: Story) -> None:
    """Neither the store nor what the opener and the fusion worker opened."""
    hub = story.work / "coordinator"
    plain = {_opened(story, hospital.name)[:64] for hospital in HOSPITALS}
    files = [path for path in hub.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 20
    assert not [path for path in files if plain & {path.read_bytes()[:64]}]


def _opened(story: Story, participant: str) -> bytes:
    """A contribution to the logits round, as the fusion worker reads it."""
    released = releases(story.work / participant / "data")
    sha256 = next(one.sha256 for one in released if one.what == "logits")
    hub, out = story.work / "coordinator", story.work.parent / "opened"
    Worker.at(worker_folder(hub / "tls" / "key.pem")).open(
        Artifacts(hub / "data" / "artifacts").path(sha256),
        out,
        round_id=story.logits.round_id,
        participant=participant,
    )
    return out.read_bytes()


def test_no_planted_patient_is_in_any_byte_that_left_or_that_anybody_was_told(
    story: Story, record_property: Callable[[str, object], None]
) -> None:
    """Plain, base64, hex, token ids; also as what the shipped rows say is likeliest."""
    public = read_prompts(story.work / "public" / "prompts.jsonl")
    places = [
        ("metrics and events", story.told.encode()),
        *files_below(story.work / "coordinator"),
        *files_below(story.work / "logs"),
        *files_below(story.downloaded),
    ]
    tokenizers = [AutoTokenizer.from_pretrained(story.downloaded)]
    for hospital in HOSPITALS:
        data = story.work / hospital.name / "data"
        tokenizers.append(AutoTokenizer.from_pretrained(data / "expert" / "model"))
        places += files_below(data / "audit")
        places.append((f"what {hospital.name} sealed", _opened(story, hospital.name)))
        places += [(p.name, likeliest(p, public)) for p in data.glob("outbox/logits-*")]
        for recorder in story.recorders:
            places.append((f"from {hospital.name}", recorder.outbound(hospital.name)))
            places.append((f"to {hospital.name}", recorder.inbound_data(hospital.name)))
    needles = {one: forms(one, tokenizers) for h in HOSPITALS for one in secrets(h.name)}
    found, size = hits(places, needles)
    record_property("phi_hits", len(found))
    record_property("bytes_searched", size)
    assert not found
    assert size > 5_000_000


def test_participants_talk_to_nobody_but_the_recorders(story: Story) -> None:
    """An idle one holds its stream to the services; the engine is dialled for a round only."""
    services, engine = (recorder.address for recorder in story.recorders)
    assert story.idle_connections == {services}
    assert story.connections == {services, engine}


def test_what_left_is_what_the_egress_log_says(story: Story) -> None:
    for hospital in HOSPITALS:
        left = releases(story.work / hospital.name / "data")
        part = next(p for p in story.logits.contributions if p.participant == hospital.name)
        assert part.size_bytes == sum(one.size_bytes for one in left if one.what == "logits")


# ---------------------------------------------------------------------------------------- pivot


def test_the_pivot_opens_with_plain_transformers(story: Story) -> None:
    model = AutoModelForCausalLM.from_pretrained(story.downloaded)
    tokenizer = AutoTokenizer.from_pretrained(story.downloaded)
    text = "Aortic valve stenosis; 3 mg/dL."
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    assert ids[0].tolist() == load_model(story.downloaded)[1](text)["input_ids"]
    assert model(ids).logits.shape[-1] == len(tokenizer)


def test_the_pivot_s_files_are_what_its_sums_say(story: Story) -> None:
    sums = (story.downloaded / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    listed = dict(reversed(line.split("  ")) for line in sums)
    files = {path.name for path in story.downloaded.iterdir()}
    assert files == {*listed, "SHA256SUMS", MANIFEST_FILE}
    for name, digest in listed.items():
        assert hashlib.sha256((story.downloaded / name).read_bytes()).hexdigest() == digest


def test_the_lineage_names_parent_and_every_contribution(story: Story) -> None:
    lineage = json.loads((story.downloaded / "lineage.json").read_text(encoding="utf-8"))
    assert lineage["parent"] == "pivot-0"
    assert set(lineage["contributions"]) == {hospital.name for hospital in HOSPITALS}
    card = (story.downloaded / "README.md").read_text(encoding="utf-8")
    for name, part in lineage["contributions"].items():
        left = releases(story.work / name / "data")
        assert part["sha256"] in [one.sha256 for one in left if one.what == "logits"]
        assert part["sha256"][:16] in card


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
