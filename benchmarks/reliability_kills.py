"""Kill -9, again and again, at random, while rounds run: what was promised must still be true.

    python benchmarks/reliability_kills.py --kills 300 [--json]

A federation of real processes: the coordinator, two participants with experts of their own, a
SuperNode at each while it is summoned, and the fusion worker with its children. What dies is
started again at once, as systemd would. A witness reads every pivot as soon as it can be seen.
"""

import argparse
import json
import random
import sqlite3
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any, Final

import psutil

# Run as a script, this file's own folder comes first and its files pass for packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reliability_many import import_pivot
from benchmarks.reliability_witness import Witness, double_fused, lost, patiently, promises
from cofuse.demo.federation import Federation, FederationError, ParticipantPlan
from cofuse.sdk import Coordinator, Round
from protos.public_sets import write_prompts
from protos.spec import RoundSpec, TrainingSpec

HOSPITALS: Final = ("st-mary", "north")
PROMPTS: Final = tuple(f"Patient {n} rests well after the surgery." for n in range(30))
"""Enough for a step of the fusion to be made of."""
IN_FLIGHT: Final = 3
GAP_S: Final = 2.0
"""Between two kills, on the mean."""
AGAIN_SHARE: Final = 0.25
"""Of the coordinator's restarts, those that are killed before they are done."""
MINUTES: Final = 60.0
START_S: Final = 120.0
DEADLINE_MINUTES: Final = 4.0
LATE_S: Final = 30.0
"""After its deadline a round has ended, one way or the other."""


class KillsError(RuntimeError):
    """The federation did not come up, or did not come to rest."""


@dataclass(kw_only=True)
class _Found:
    """What the killing has shown so far."""

    kills: Counter[str] = field(default_factory=Counter)
    ready_s: list[float] = field(default_factory=list)
    promised: set[tuple[str, str, str]] = field(default_factory=set)
    """(round, participant, sha256) of every receipt."""


def measure(
    kills: int,
    *,
    seed: int = 0,
    gap_s: float = GAP_S,
    minutes: float = MINUTES,
    deadline_minutes: float = DEADLINE_MINUTES,
) -> dict[str, Any]:
    """Kill so many processes while rounds run; return what was lost, doubled or half.

    Args: minutes: no further kills after so long. deadline_minutes: of each round.

    Raises: KillsError, FederationError when a process ends by itself.
    """
    with tempfile.TemporaryDirectory(prefix="cofuse-kills-") as folder:
        work = Path(folder)
        with Federation(work, lambda _who, _message: None) as federation:
            plans = _start(federation, work)
            dice = random.Random(seed)
            found = _Found()
            with _witness(federation, work) as witness, federation.connect("researcher") as sdk:
                ends = time.monotonic() + minutes * 60
                while found.kills.total() < kills and time.monotonic() < ends:
                    patiently(lambda: _keep_busy(sdk, work, dice, deadline_minutes))
                    Event().wait(dice.expovariate(1 / gap_s))
                    found.promised |= promises(work, HOSPITALS)
                    _kill_one(federation, plans, dice, found)
                rounds = _come_to_rest(sdk, deadline_minutes)
                found.promised |= promises(work, HOSPITALS)
                patiently(witness.look_again)
            return _figures(found, witness, rounds, work)


def _start(federation: Federation, work: Path) -> dict[str, ParticipantPlan]:
    """Bring up everything; return once both experts can be asked."""
    federation.init()
    federation.start_coordinator()
    import_pivot(federation, work)
    (work / "public").mkdir()
    write_prompts(work / "public" / "prompts.jsonl", PROMPTS)
    plans = {name: _plan(work, name) for name in HOSPITALS}
    for plan in plans.values():
        federation.start_participant(plan)
    experts = [work / name / "data" / "expert" / "model" for name in HOSPITALS]
    ends = time.monotonic() + START_S
    while not all(expert.exists() for expert in experts):
        federation.check()
        if time.monotonic() > ends:
            raise KillsError(f"no experts after {START_S:.0f} s: look at {work / 'logs'}")
        Event().wait(0.2)
    return plans


def _plan(work: Path, name: str) -> ParticipantPlan:
    """The smallest expert that can be grown."""
    corpus = work / f"{name}.jsonl"
    write_prompts(corpus, [f"Patient {n} of {name} rests well." for n in range(40)])
    return ParticipantPlan(
        name=name,
        corpus=corpus,
        model={
            "architecture": "llama",
            "hidden_size": 32,
            "layers": 1,
            "heads": 2,
            "vocab_size": 300,
            "context": 64,
        },
        training={
            "steps": 4,
            "batch_size": 2,
            "seq_len": 32,
            "warmup_steps": 1,
            "checkpoint_every": 2,
        },
        policy={"ship_logits": True},
    )


@contextmanager
def _witness(federation: Federation, work: Path) -> Iterator[Witness]:
    witness = Witness(federation.connect("operator"), work / "seen")
    witness.start()
    try:
        yield witness
    finally:
        witness.stop()


def _keep_busy(sdk: Coordinator, work: Path, dice: random.Random, deadline_minutes: float) -> None:
    """Keep so many rounds in flight; each has a seed of its own, so no two are the same work."""
    for _ in range(IN_FLIGHT - sum(not one.final for one in sdk.rounds())):
        spec = RoundSpec(
            name="killed",
            pivot="pivot-0",
            participants=HOSPITALS,
            kind="logits",
            method="unified",
            prompts="prompts.jsonl",
            top_k=4,
            training=TrainingSpec(steps=2, batch_size=2, seq_len=32, lr=1e-3, warmup_steps=0),
            deadline_minutes=deadline_minutes,
            seed=dice.randrange(2**31),
        )
        sdk.submit(spec, folder=work / "public")


def _kill_one(
    federation: Federation,
    plans: dict[str, ParticipantPlan],
    dice: random.Random,
    found: _Found,
) -> None:
    """Kill a process of a kind drawn at random among those alive; start again what ended."""
    targets = _alive(federation)
    kind = dice.choice(sorted(targets))
    if kind == "coordinator":
        federation.kill(kind)
        found.kills[kind] += 1
        while dice.random() < AGAIN_SHARE:
            federation.begin_coordinator()
            Event().wait(dice.uniform(0, 3))
            federation.kill(kind)
            found.kills["coordinator starting"] += 1
        began = time.monotonic()
        federation.start_coordinator()
        found.ready_s.append(time.monotonic() - began)
    elif kind == "participant":
        name = dice.choice(HOSPITALS)
        federation.kill(name)
        found.kills[kind] += 1
        federation.start_participant(plans[name])
    else:
        with suppress(psutil.NoSuchProcess):  # it ended by itself a moment ago
            dice.choice(targets[kind]).kill()
            found.kills[kind] += 1


def _alive(federation: Federation) -> dict[str, list[psutil.Process]]:
    """Processes that may be killed, by kind."""
    coordinator = psutil.Process(federation.pid("coordinator"))
    participants = [psutil.Process(federation.pid(name)) for name in HOSPITALS]
    children = [*coordinator.children(recursive=True)]
    children += [child for one in participants for child in one.children(recursive=True)]
    found = {"coordinator": [coordinator], "participant": participants}
    for child in children:
        with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            words = " ".join(child.cmdline())
            if "coordinator.fuse_worker" in words:
                found.setdefault("fusion worker", []).append(child)
            elif "supernode.py" in words:
                found.setdefault("supernode", []).append(child)
            elif "participant.child" in words:
                found.setdefault(child.cmdline()[3], []).append(child)  # the role
    return found


def _come_to_rest(sdk: Coordinator, deadline_minutes: float) -> list[Round]:
    """Wait until every round has ended, for as long as it may take; return them all."""
    ends = time.monotonic() + deadline_minutes * 60 + LATE_S
    while time.monotonic() < ends:
        rounds = patiently(sdk.rounds)
        if all(one.final for one in rounds):
            break
        Event().wait(0.5)
    return rounds


def _figures(
    found: _Found, witness: Witness, rounds: Sequence[Round], work: Path
) -> dict[str, Any]:
    data = work / "coordinator" / "data"
    with sqlite3.connect(data / "coordinator.sqlite") as database:
        lost_receipts = lost(database, found.promised)
        doubled = double_fused(database, witness.lineages)
    return {
        "kills": found.kills.total(),
        "lost_receipts": len(lost_receipts),
        "double_fused": len(doubled),
        "half_pivots": len(witness.halves),
        "ready_seconds_max": round(max(found.ready_s, default=0.0), 2),
        "ready_seconds_median": round(statistics.median(found.ready_s or [0.0]), 2),
        "receipts": len(found.promised),
        "pivots": len(witness.lineages),
        "killed": dict(found.kills),
        "rounds": dict(Counter(one.state for one in rounds)),
        "unended": sum(not one.final for one in rounds),
        "words": [*lost_receipts, *doubled, *witness.halves][:10],
        "why": dict(Counter(one.detail[-200:] for one in rounds if one.state != "PUBLISHED")),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, and print what was found; exit 1 when a promise was broken."""
    parser = argparse.ArgumentParser(description="Kill -9 at random while rounds run.")
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--gap", type=float, default=GAP_S, help="mean seconds between kills")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="kill for so long at most")
    parser.add_argument("--deadline", type=float, default=DEADLINE_MINUTES, help="minutes a round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, last")
    arguments = parser.parse_args(argv)
    try:
        found = measure(
            arguments.kills,
            seed=arguments.seed,
            gap_s=arguments.gap,
            minutes=arguments.minutes,
            deadline_minutes=arguments.deadline,
        )
    except (KillsError, FederationError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stderr.write("".join(f"{key}: {value}\n" for key, value in found.items()))
    if arguments.json:
        sys.stdout.write(json.dumps(found) + "\n")
    broken = ("lost_receipts", "double_fused", "half_pivots", "unended")
    return int(any(found[key] for key in broken))


if __name__ == "__main__":
    raise SystemExit(main())
