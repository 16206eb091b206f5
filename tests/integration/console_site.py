"""A small federation with a console: real daemons, real rounds, one participant that asks first."""

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cofuse.demo.federation import Federation, ParticipantPlan
from cofuse.demo.material import base_job, write_texts
from cofuse.demo.result import DemoPlan
from cofuse.demo.run import round_spec
from cofuse.demo.settings import TINY, DemoSettings
from cofuse.sdk import Coordinator, Round
from coordinator.console.users import Users
from protos.spec import RoundSpec

PASSWORD = "correct horse battery"
OPERATOR, RESEARCHER = "demo-operator", "demo-researcher"
"""As in their certificates: what they do in the console is the same person's."""
PATIENCE_S = 240.0
ASKS = """
version = 2
[[allow]]
purpose = "general"
submitters = ["*"]
kinds = ["logits", "scores"]
prompt_sets = ["*"]
approval = "manual"
[[allow]]
purpose = "trial"
submitters = ["*"]
kinds = ["logits", "scores", "weights"]
prompt_sets = ["*"]
approval = "auto"
[logits]
k_max = 16
releases_per_prompt = 100
[weights]
enabled = true
[prompts]
overlap = "off"
phi = "off"
"""
"""The third participant's policy.toml: a person looks first, unless the purpose is a trial."""


@dataclass
class Site:
    """What a test may do with it besides looking at the pages."""

    url: str
    folder: Path
    plan: DemoPlan
    federation: Federation
    operator: Coordinator
    researcher: Coordinator

    def submit(self, example: str, **changes: Any) -> str:
        """A round of examples/ with other settings; return its id."""
        spec: RoundSpec = round_spec(example, self.plan).model_copy(update=changes)
        return self.researcher.submit(spec, folder=self.folder / "public")

    def run(self, example: str, **changes: Any) -> Round:
        """Submit, approve, and wait until it has ended."""
        round_id = self.submit(example, **changes)
        self.operator.approve(round_id)
        return self.researcher.wait(round_id)


@contextmanager
def console_site(folder: Path, settings: DemoSettings = TINY) -> Iterator[Site]:
    """Serve a coordinator, its console and three participants until the block ends."""
    hospitals = settings.hospitals[:3]
    plan = DemoPlan(
        out=folder, settings=settings, hospitals=hospitals, rounds=(), seed=3, source="sample"
    )
    console = {
        "approval": "operator",
        "authority": "ca",
        "enroll_listen": f"127.0.0.1:{_free_port()}",
        "console": {"listen": "127.0.0.1:0"},
    }
    with Federation(folder, lambda _who, _message: None, settings=console) as federation:
        federation.init()
        users = Users(folder / "coordinator" / "data")
        users.add(OPERATOR, "operator", PASSWORD)
        users.add(RESEARCHER, "researcher", PASSWORD)
        federation.start_coordinator()
        write_texts(plan, folder)
        for hospital in hospitals:
            federation.start_participant(
                ParticipantPlan(
                    name=hospital.name,
                    corpus=folder / "text" / hospital.name / "private.jsonl",
                    model=hospital.model,
                    training=settings.expert_training,
                    policy={"ship_logits": True, "ship_scores": True, "ship_weights": True},
                )
            )
        # Read anew for each round.
        (folder / hospitals[2].name / "policy.toml").write_text(ASKS, encoding="utf-8")
        federation.run("pivot-0", "cofuse.demo.base_pivot", [str(base_job(plan, folder))])
        federation.wait("pivot-0")
        operator, researcher = federation.connect("operator"), federation.connect("researcher")
        with operator, researcher:
            operator.import_pivot("pivot-0", folder / "pivot-0")
            wait_for(lambda: len(researcher.participants()) == len(hospitals), federation)
            yield Site(federation.console_url, folder, plan, federation, operator, researcher)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def wait_for(holds: Callable[[], bool], federation: Federation) -> None:
    """Wait for something to become so.

    Raises: TimeoutError; FederationError when a process has died.
    """
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / 0.2)):
        if holds():
            return
        federation.check()
        pause.wait(0.2)
    raise TimeoutError(f"it did not become so within {PATIENCE_S:.0f} s")


LIFELIKE = replace(
    TINY,
    limits=replace(TINY.limits, private=60_000, public=12_000, heldout=6_000, questions=12),
    expert_training={**TINY.expert_training, "steps": 80, "seq_len": 96, "decay_steps": 20},
    pivot_training={**TINY.pivot_training, "steps": 40},
    round_steps=80,
)
"""For screenshots: enough training that pages have something to tell."""
