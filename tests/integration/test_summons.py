"""Real daemons before a real coordinator: who is summoned, what stops work, what survives.

The experts are tiny and untrained, and come ready made, so that all time goes into the rounds.
"""

import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from cofuse.sdk import Coordinator
from coordinator.config import CoordinatorConfig
from coordinator.wiring import serving
from fusion.models import ModelSpec, build_model, save_model, train_tokenizer
from participant import loop
from participant.approvals import Approvals
from participant.egress import releases
from participant.sandbox import ROLES
from participant.status import PAUSED, read_status
from protos.config import TlsConfig, toml_text
from protos.process import end, spawn
from protos.public_sets import write_prompts
from protos.spec import RoundSpec
from tests.integration.household import Household
from tests.integration.recorder import Recorder
from tests.participant.settings import write_settings
from trust import audit
from trust.ca import create_authority, new_identity, sign_request

pytestmark = pytest.mark.timeout(300)
TEXTS = ["Aortic valve stenosis is a narrowing.", "Atrial fibrillation is an arrhythmia."]
NAMES = ("a", "b", "c", "d", "e")
PATIENCE_S = 180.0


def until(condition: Callable[[], Any], seconds: float = PATIENCE_S) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come to pass"
        time.sleep(0.05)


@dataclass
class Site:
    """One participant's folder, and its programs in threads."""

    home: Path
    household: Household | None = None

    @property
    def data(self) -> Path:
        return self.home / "data"

    def start(self) -> None:
        self.household = Household(self.home)
        self.household.start()

    def stop(self) -> None:
        if self.household is not None:
            self.household.stop()
            self.household = None

    @property
    def told(self) -> list[tuple[str, dict[str, Any]]]:
        assert self.household is not None
        return self.household.told

    def heard(self, kind: str, **body: Any) -> bool:
        return any(k == kind and body.items() <= b.items() for k, b in list(self.told))

    def attends(self) -> bool:
        assert self.household is not None
        return bool(self.household.guard.status()["attending"])

    def supernode(self) -> Any:
        assert self.household is not None
        return self.household.courier.engine._child


@dataclass
class Hub:
    """A coordinator, its researcher, and recorders before both of its ports."""

    root: Path
    services: Recorder
    engine: Recorder
    operator: Coordinator
    sites: dict[str, Site] = field(default_factory=dict)

    def site(self, name: str) -> Site:
        """Make a participant whose expert is finished."""
        home = self.root / name
        identity(self.root, "participant", name, home)
        for recorder in (self.services, self.engine):
            recorder.admit(name, home / "certificate.pem", home / "key.pem")
        tokenizer = train_tokenizer(TEXTS, 300)
        spec = ModelSpec(
            architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
        )
        expert = home / "data" / "expert" / "model"
        save_model(build_model(spec, 1), tokenizer, expert)
        facts = {"version": 1, "steps": 1, "finished_unix_ms": 1}
        (expert / "expert.json").write_text(json.dumps(facts), encoding="utf-8")
        (home / "corpus.jsonl").write_text(json.dumps({"text": " ".join(TEXTS) * 20}))
        policy = {"ship_logits": True, "ship_weights": True, "ship_scores": True}
        (home / "policy.toml").write_text(toml_text(policy), encoding="utf-8")
        write_settings(
            home,
            name=name,
            coordinator=self.services.address,
            corpus="corpus.jsonl",
            model=spec_of(len(tokenizer)),
        )
        self.sites[name] = Site(home)
        return self.sites[name]

    def submit(self, *names: str, **change: Any) -> str:
        values = {
            "name": "first",
            "pivot": "pivot-0",
            "participants": names,
            "kind": "logits",
            "method": "unified",
            "prompts": "prompts.jsonl",
            "top_k": 4,
            "training": {"steps": 1, "lr": 0.001},
            **change,
        }
        return self.operator.submit(RoundSpec.model_validate(values), folder=self.root / "public")

    def status(self, round_id: str) -> dict[str, str]:
        parts = self.operator.round(round_id).contributions
        return {part.participant: part.status for part in parts}

    def cancel(self, round_id: str) -> None:
        if self.operator.round(round_id).state not in ("FAILED", "PUBLISHED", "CANCELLED"):
            self.operator.cancel(round_id)


def spec_of(vocab_size: int) -> dict[str, Any]:
    shape = {"hidden_size": 32, "layers": 1, "heads": 2}
    return {"architecture": "llama", "vocab_size": max(300, vocab_size), **shape}


def identity(root: Path, role: Any, name: str, home: Path) -> None:
    request = new_identity(home, role, name)
    pem = sign_request(root / "ca", request, role=role, name=name)
    (home / "certificate.pem").write_bytes(pem)
    for public in (root / "ca").glob("*.pem"):  # the authority, and who signs pivots
        (home / public.name).write_bytes(public.read_bytes())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("summons")
    create_authority(root / "ca", "test")
    identity(root, "coordinator", "hub", root / "hub")
    identity(root, "operator", "grace", root / "grace")
    pair = root / "hub" / "certificate.pem", root / "hub" / "key.pem"
    services = Recorder(root / "ca" / "ca.pem", pair, http2=True)
    engine = Recorder(root / "ca" / "ca.pem", pair, http2=False)
    config = CoordinatorConfig(
        listen="127.0.0.1:0",
        engine_listen="127.0.0.1:0",
        engine_advertise=engine.address,
        data_dir=root / "hub-data",
        approval="auto",
        tls=TlsConfig(ca=root / "ca" / "ca.pem", certificate=pair[0], key=pair[1]),
    )
    public = root / "public"
    public.mkdir()
    for number, name in enumerate(("prompts", "other", "working", "ship")):
        write_prompts(public / f"{name}.jsonl", [*TEXTS, f"This is set {number}."])
    tokenizer = train_tokenizer(TEXTS, 300)
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    save_model(build_model(spec, 0), tokenizer, root / "model")
    with serving(config) as running:
        services.target, engine.target = running.address, running.engine_address
        loop = threading.Thread(target=running.scheduler.run)
        loop.start()
        files = {k: root / "grace" / f"{k}.pem" for k in ("ca", "certificate", "key")}
        with Coordinator(running.address, **files) as operator:
            operator.import_pivot("pivot-0", root / "model")
            made = Hub(root, services, engine, operator)
            try:
                for name in NAMES:
                    made.site(name).start()
                until(lambda: set(operator.participants()) == set(NAMES))
                yield made
            finally:
                for site in made.sites.values():
                    site.stop()
                running.scheduler.stop()
                loop.join()
    for recorder in (services, engine):
        recorder.close()


def test_a_round_that_names_two_of_five_sends_nothing_to_the_other_three(hub: Hub) -> None:
    """Not one message more than before, on either port; and nobody lingers at the engine."""
    # Each has its first summons, which says that it is not summoned.
    until(lambda: all(site.attends() for site in hub.sites.values()))
    before = {name: hub.services.inbound_data(name) for name in NAMES}
    assert {hub.engine.connections(name) for name in NAMES} == {0}
    round_id = hub.submit("b", "d")
    until(lambda: hub.status(round_id) == {"b": "committed", "d": "committed"})
    until(lambda: all(hub.sites[name].supernode() is None for name in "bd"))
    hub.cancel(round_id)
    after = {name: hub.services.inbound_data(name) for name in NAMES}
    assert [name for name in NAMES if after[name] == before[name]] == ["a", "c", "e"]
    assert [name for name in NAMES if hub.engine.connections(name) == 0] == ["a", "c", "e"]


def test_a_cancelled_round_ends_the_work_in_hand_within_seconds(hub: Hub) -> None:
    long = {"steps": 1_000_000, "lr": 0.001, "batch_size": 1, "seq_len": 16}
    site = hub.sites["a"]
    round_id = hub.submit("a", kind="weights", method="merge", prompts=None, training=long)
    until(lambda: site.heard("adapt"))
    hub.operator.cancel(round_id)
    until(lambda: site.heard("round", round=round_id, status="cancelled"), seconds=5)
    until(lambda: site.supernode() is None, seconds=5)
    status = read_status(site.data)
    assert status is not None
    assert status["working_rounds"] == []
    steps = len(site.told)
    time.sleep(0.5)
    assert len(site.told) <= steps + 1  # it trains no more


@pytest.mark.slow
def test_a_paused_participant_is_asked_once_it_resumes(hub: Hub) -> None:
    site = hub.sites["c"]
    (site.data / PAUSED).touch()
    until(lambda: (read_status(site.data) or {})["doing"] == "paused")
    round_id = hub.submit("c", "e")
    until(lambda: hub.status(round_id).get("e") == "committed")
    assert hub.status(round_id)["c"] == "assigned"
    assert site.supernode() is None
    (site.data / PAUSED).unlink()
    until(lambda: hub.status(round_id)["c"] == "committed")
    hub.cancel(round_id)


def test_a_full_disk_is_said_and_waited_for_and_nothing_leaves_unrecorded(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "RETRY_S", 0.3)
    site = hub.sites["e"]
    append, full = audit.append, threading.Event()

    def append_unless_full(path: Path, content: bytes) -> None:
        if full.is_set() and path.is_relative_to(site.data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(path, content)

    monkeypatch.setattr(audit, "append", append_unless_full)
    full.set()
    round_id = hub.submit("e", prompts="other.jsonl")
    until(lambda: site.heard("disk"))
    assert "No space left on device" in next(b["problem"] for k, b in site.told if k == "disk")
    assert hub.status(round_id) == {"e": "assigned"}
    full.clear()
    until(lambda: hub.status(round_id) == {"e": "committed"})
    shipped = [one for one in releases(site.data) if one.what == "logits"]
    assert shipped[-1].round == round_id
    hub.cancel(round_id)


def test_a_release_that_waits_for_a_person_holds_up_nothing_else(hub: Hub) -> None:
    site, flat = hub.sites["a"], (hub.sites["a"].home / "policy.toml").read_text()
    rule = '[[allow]]\nsubmitters = ["*"]\nkinds = ["logits"]\nprompt_sets = ["*"]\n'
    rules = f'{rule}purpose = "watched"\n{rule}purpose = "free"\napproval = "auto"\n'
    (site.home / "policy.toml").write_text(f"version = 2\n{rules}", encoding="utf-8")
    watched = hub.submit("a", purpose="watched")

    def why() -> str:
        return " ".join(found.says for found in hub.operator.why(watched))

    until(lambda: "a has its contribution ready, and waits for its approval there" in why())
    free = hub.submit("a", purpose="free")
    until(lambda: hub.status(free) == {"a": "committed"})
    assert hub.status(watched) == {"a": "assigned"}
    desk = Approvals(site.data / "approvals")
    desk.decide(desk.find(watched), approved=True, by="mary")
    until(lambda: hub.status(watched) == {"a": "committed"})
    left = releases(site.data)
    (line,) = [one for one in left if (one.round, one.what) == (watched, "logits")]
    assert (line.approver, line.rule) == ("mary", "allow 1: watched")
    (site.home / "policy.toml").write_text(flat, encoding="utf-8")
    for round_id in (watched, free):
        hub.cancel(round_id)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["working", "ship"])
def test_a_daemon_killed_at_its_work_goes_on_with_it_and_commits_once(
    hub: Hub, moment: str
) -> None:
    site = hub.sites["d"]
    site.stop()
    arguments = [str(site.home / "participant.toml")]
    program = spawn("participant.daemon", arguments)
    assert program.stdout is not None
    made = len(list(releases(site.data)))
    round_id = hub.submit("d", prompts=f"{moment}.jsonl")
    for line in program.stdout:
        message = json.loads(line)
        if moment in (message["kind"], message.get("status")):
            break
    program.send_signal(signal.SIGKILL)
    program.wait()
    again = spawn("participant.daemon", arguments)
    until(lambda: hub.status(round_id) == {"d": "committed"})
    until(lambda: "report" in [one.what for one in list(releases(site.data))[made:]])
    again.send_signal(signal.SIGTERM)
    assert again.wait(20) == 0
    end(again)
    lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    assert not [line for line in lines if "participant" in line]
    hub.cancel(round_id)


@pytest.mark.slow
def test_each_of_the_three_processes_may_be_killed_at_its_work(hub: Hub) -> None:
    """The one that dies is started again, the round is committed, and the budget counts it once."""
    site = hub.sites["b"]
    site.stop()
    program = spawn("participant.daemon", [str(site.home / "participant.toml")])
    try:
        for role in ROLES:
            for moment in ("working", "ship"):
                kill_at_work(hub, site, program, role, moment)
        children = list(processes(program.pid).values())
        program.kill()
        program.wait()
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive  # nobody outlives the supervisor
    finally:
        end(program)


def kill_at_work(hub: Hub, site: Site, program: Any, role: str, moment: str) -> None:
    until(lambda: set(processes(program.pid)) == set(ROLES))
    before = processes(program.pid)
    name = f"{role}-{moment}.jsonl"
    write_prompts(hub.root / "public" / name, [*TEXTS, f"Kill the {role}: {moment}."])
    round_id = hub.submit("b", prompts=name)
    for line in program.stdout:
        message = json.loads(line)
        if moment in (message["kind"], message.get("status")):
            break
    before[role].kill()
    until(lambda: hub.status(round_id) == {"b": "committed"})
    until(lambda: set(processes(program.pid)) == set(ROLES))
    after = processes(program.pid)
    assert {one for one in after if after[one].pid != before[one].pid} == {role}
    assert read_budget(site, round_id) == 1
    shipped = [one.what for one in releases(site.data) if one.round == round_id]
    assert "logits" in shipped
    hub.cancel(round_id)


def processes(supervisor: int) -> dict[str, psutil.Process]:
    """The processes of a participant, by role."""
    found = {}
    for child in psutil.Process(supervisor).children():
        words = child.cmdline()
        if "participant.child" in words:
            found[words[words.index("participant.child") + 1]] = child
    return found


def read_budget(site: Site, round_id: str) -> int:
    """How often a round is reserved in the ledger."""
    lines = (site.data / "budget.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    return sum(e["act"] == "reserve" and e["question"]["round_id"] == round_id for e in entries)
