"""`cofuse demo`: three hospitals, one coordinator, three rounds, one table, on this machine.

Nothing here is simulated: the same daemons, certificates, files and training as in production,
only small. What the table claims is checked, and the demo fails when a claim does not hold.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from cofuse.demo.chat import ask_pivot, first_questions
from cofuse.demo.federation import Federation, ParticipantPlan
from cofuse.demo.material import base_job, write_texts
from cofuse.demo.result import PIVOT_OF, DemoPlan, DemoResult, claims, ordered
from cofuse.demo.screen import Screen
from cofuse.demo.settings import Hospital
from cofuse.sdk import Coordinator, Event, Round
from participant.egress import releases
from protos.spec import RoundSpec, load_spec

ROUNDS: Final = ("logits-unified", "logits-pairwise", "weights")
EXAMPLES: Final = Path(__file__).resolve().parents[2] / "examples"
_MARK: Final = "cofuse-demo"
_SAMPLE_S: Final = 0.5
_CHECK_S: Final = 0.5


class DemoError(RuntimeError):
    """The demo could not go on; the message says why and what to do."""


def run_demo(plan: DemoPlan, screen: Screen) -> DemoResult:
    """Do it all; leave pivots, report data and logs below plan.out.

    Raises: DemoError, FederationError, and what the corpora raise when packages are missing.
    """
    start = time.monotonic()
    result = DemoResult()
    work = _clear(plan.out)
    with peak_memory() as memory, Federation(work, _Ear(screen, result)) as federation:
        screen.say("coordinator: making its certificate authority and starting, mutual TLS")
        federation.init()
        federation.begin_coordinator()
        screen.say(f"reading ICD-10-CM, MONDO and HPO for {len(plan.hospitals)} hospitals")
        write_texts(plan, work)
        federation.await_coordinator()
        screen.say("starting the hospitals; each loads torch, then trains")
        for hospital in plan.hospitals:
            federation.start_participant(_participant(plan, hospital, work))
        federation.run("pivot-0", "cofuse.demo.base_pivot", [str(base_job(plan, work))])
        federation.wait("pivot-0")
        with federation.connect("operator") as operator:
            operator.import_pivot("pivot-0", work / "pivot-0")
        with federation.connect("researcher") as researcher:
            _wait_joined(federation, researcher, plan)
            _run_rounds(federation, researcher, plan, screen, result)
        _collect_egress(plan, work, result)
    screen.say("asking the pivot a question of each hospital: cofuse pivot chat")
    asked = first_questions(work / "public" / "evals.json")
    result.chat = ask_pivot(Path(next(iter(result.pivots.values()))), asked)
    result.bpb, result.accuracy = (ordered(table, plan) for table in (result.bpb, result.accuracy))
    result.peak_rss_mb = round(memory.peak_mb, 1)
    result.seconds = round(time.monotonic() - start, 1)
    result.claims = claims(result.bpb)
    return result


@dataclass
class PeakMemory:
    """The most memory this process and everything it started held at once (sum of RSS)."""

    peak_mb: float = 0.0


@contextlib.contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Watch while the block runs. Shared pages count once for each process: an upper bound."""
    memory, stop = PeakMemory(), threading.Event()

    def watch() -> None:
        own = psutil.Process()
        while not stop.wait(_SAMPLE_S):
            total = 0
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    total += process.memory_info().rss
            memory.peak_mb = max(memory.peak_mb, total / 2**20)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        stop.set()
        watcher.join()


class _Ear:
    """Turns what the processes say into bars and remembered curves."""

    def __init__(self, screen: Screen, result: DemoResult) -> None:
        self._screen = screen
        self._result = result

    def __call__(self, who: str, message: dict[str, Any]) -> None:
        kind = message.get("kind")
        if kind in ("train", "adapt", "logits"):
            words = {
                "train": f"{who}: pre-training in FP8",
                "adapt": f"{who}: training the pivot's copy",
                "logits": f"{who}: computing logits",
            }
            loss = f"loss {message['loss']:.3f}" if "loss" in message else ""
            self._screen.show(words[kind], message["step"], message["steps"], loss)
        elif kind == "trained":
            name = "pivot-0" if who == "pivot-0" else f"expert:{who}"
            self._result.curves[name] = message["losses"]
        elif kind == "egress":
            self._result.bytes_left[who] = message["bytes"]
        elif kind == "ship":
            self._screen.say(f"{who}: shipping {message['size_bytes'] / 1e6:.2f} MB")


def _clear(out: Path) -> Path:
    """Empty the demo's own folder of an earlier run; refuse to touch any other."""
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise DemoError(f"{out} holds other files; give another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    work = out / "federation"
    work.mkdir(parents=True)
    (out / _MARK).write_text("Made by `cofuse demo`; the next one empties this folder.\n")
    return work


def _participant(plan: DemoPlan, hospital: Hospital, work: Path) -> ParticipantPlan:
    return ParticipantPlan(
        name=hospital.name,
        corpus=work / "text" / hospital.name / "private.jsonl",
        model=hospital.model,
        training={**plan.settings.expert_training, "seed": plan.seed},
        # Weights stay at home unless the policy says otherwise; here it does, for the third round.
        policy={"ship_logits": True, "ship_scores": True, "ship_weights": True},
    )


def _wait_joined(federation: Federation, researcher: Coordinator, plan: DemoPlan) -> None:
    wanted = {hospital.name for hospital in plan.hospitals}
    while wanted - set(researcher.participants()):
        federation.check()
        time.sleep(_CHECK_S)


def _run_rounds(
    federation: Federation,
    researcher: Coordinator,
    plan: DemoPlan,
    screen: Screen,
    result: DemoResult,
) -> None:
    """Submit every round at once, as a researcher might, and follow each to its end."""
    public = plan.out / "federation" / "public"
    ids = {
        name: researcher.submit(round_spec(name, plan), folder=public, request_id=name)
        for name in plan.rounds
    }
    with ThreadPoolExecutor(len(ids)) as pool:
        finals = {
            name: pool.submit(_follow, researcher, name, round_id, screen)
            for name, round_id in ids.items()
        }
        try:
            while not all(future.done() for future in finals.values()):
                federation.check()
                time.sleep(_CHECK_S)
        except BaseException:
            researcher.close()  # ends the watching threads, which the pool would wait for
            raise
    for name, future in finals.items():
        final = future.result()
        if final.state != "PUBLISHED":
            raise DemoError(f"round {name} ended {final.state}: {final.detail}")
        _take_home(researcher, name, final, plan, result)


def round_spec(name: str, plan: DemoPlan) -> RoundSpec:
    """The round of examples/, for this demo's hospitals and seed."""
    spec = load_spec(EXAMPLES / f"{name}.yaml")
    update: dict[str, Any] = {
        "participants": tuple(hospital.name for hospital in plan.hospitals),
        "seed": plan.seed,
    }
    if plan.settings.round_steps:
        steps = {
            "steps": plan.settings.round_steps,
            "warmup_steps": min(spec.training.warmup_steps, plan.settings.round_steps // 4),
        }
        update["training"] = spec.training.model_copy(update=steps)
    return spec.model_copy(update=update)


def _follow(researcher: Coordinator, name: str, round_id: str, screen: Screen) -> Round:
    for event in researcher.watch(round_id):
        _show_event(name, event, screen)
    return researcher.round(round_id)


def _show_event(name: str, event: Event, screen: Screen) -> None:
    body = event.body
    if event.kind == "state":
        screen.say(f"round {name}: {body['state']} {body['detail']}".rstrip())
    elif event.kind == "contribution":
        size = f"{body['size_bytes'] / 1e6:.2f} MB" if "size_bytes" in body else body["detail"]
        screen.say(f"round {name}: {body['participant']} {body['status']} {size}")
    elif event.kind == "progress" and body.get("phase") == "train":
        loss = f"loss {body['loss']:.3f}"
        screen.show(f"{name}: {body['run']}", body["step"], body["steps"], loss)


def _take_home(
    researcher: Coordinator, name: str, final: Round, plan: DemoPlan, result: DemoResult
) -> None:
    """Download the pivot and add its numbers to the tables."""
    kind = PIVOT_OF[name]
    # The rounds run side by side, so whichever ends first has the lower version; we want each.
    folder = researcher.download_pivot(
        final.pivot_name, plan.out / "pivots" / final.pivot_name, older=True
    )
    result.pivots[kind] = str(folder)
    evals = researcher.pivot(final.pivot_name).evals
    for table, found in ((result.bpb, evals["bpb"]), (result.accuracy, evals["accuracy"])):
        for model, scores in found.items():
            table.setdefault(model, scores)
    result.credit = result.credit or evals["credit"]
    losses = json.loads((folder / "losses.json").read_text(encoding="utf-8"))
    result.curves.update(losses)
    reports = {part.participant: part.report for part in final.contributions}
    result.participants = [
        {
            "name": hospital.name,
            "department": hospital.department,
            **{key: reports[hospital.name][key] for key in ("architecture", "parameters")},
            "vocabulary": reports[hospital.name]["vocabulary"],
        }
        for hospital in plan.hospitals
    ]


def _collect_egress(plan: DemoPlan, work: Path, result: DemoResult) -> None:
    """Bytes each participant's own egress log says it let out."""
    for hospital in plan.hospitals:
        left = releases(work / hospital.name / "data")
        result.bytes_left[hospital.name] = sum(one.size_bytes for one in left if one.allowed)
