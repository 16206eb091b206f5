"""Many participants at one coordinator: what it costs to have them wait, and to hear them all.

    python benchmarks/reliability_many.py --participants 100 300 1000 [--json]

One real coordinator process; the participants are light (benchmarks/reliability_light.py), each
with a key, a certificate and a stream of its own, in two processes on the same machine. First they
only attend. Then one round names all of them, with K = 1 on a few prompts.
"""

import argparse
import json
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import psutil

# Run as a script, this file's own folder comes first and its files pass for packages.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.reliability_fleet import Fleet, fleets
from benchmarks.reliability_light import Identity
from benchmarks.reliability_member import Tally
from cofuse.demo.federation import Federation
from cofuse.sdk import Coordinator
from protos.public_sets import write_prompts
from protos.spec import RoundSpec, TrainingSpec

ASKERS: Final = 20
ASK_EVERY_S: Final = 1.0
"""The askers beat as often as this; all others, every 10 s."""
READY_S: Final = 600.0
COLLECT_MINUTES: Final = 15.0
PROMPTS: Final = tuple(f"Patient {n} rests well after the surgery." for n in range(4))


class ManyError(RuntimeError):
    """The participants did not come, or the round did not end; the message holds what was seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attending:
    """All attend, and nobody has anything to do."""

    cpu_cores: float
    """Of the coordinator's process, over the window."""
    rss_mib: float
    p99_ms: float
    """From a beat that must be answered to its answer."""
    median_ms: float
    missed: int
    beats: int
    arrival_s: float
    """From the first dials until all attend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """One round that named all of them."""

    receipts: int
    lost_receipts: int
    """Promised to a participant, and not in the store."""
    collect_s: float
    """From the submission to the last report."""
    collect_cpu_cores: float
    collect_rss_mib: float
    collect_p99_ms: float
    collect_missed: int
    engine_retries: int
    failures: int


def measure(participants: int, *, window_s: float = 60.0) -> dict[str, Any]:
    """Attend for window_s, then hold one round; return the figures of both.

    Raises: ManyError.
    """
    with tempfile.TemporaryDirectory(prefix="cofuse-many-") as folder:
        work = Path(folder)
        with Federation(work, lambda _who, _message: None) as federation:
            federation.init()
            people = [_enrolled(federation, work, f"site-{n:04d}") for n in range(participants)]
            federation.start_coordinator()
            import_pivot(federation, work)
            server = psutil.Process(federation.pid("coordinator"))
            with fleets(
                people,
                federation.address,
                askers=min(ASKERS, participants // 2),
                ask_every_s=ASK_EVERY_S,
            ) as both:
                attending = _attend(both, server, participants, window_s)
                database = work / "coordinator" / "data" / "coordinator.sqlite"
                with federation.connect("researcher") as researcher:
                    names = [person.name for person in people]
                    collected = _hold_round(both, server, researcher, names, work, database)
    return {**asdict(attending), **asdict(collected)}


def _enrolled(federation: Federation, work: Path, name: str) -> Identity:
    federation.enrol(name)
    return Identity(name=name, home=work / name)


def import_pivot(federation: Federation, work: Path) -> None:
    """The smallest model that a round can start from."""
    # The fleets' processes import this file too, and have no use for torch.
    from fusion.models import ModelSpec, build_model, save_model, train_tokenizer

    tokenizer = train_tokenizer(list(PROMPTS), 300)
    shape = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    save_model(build_model(shape, 0), tokenizer, work / "pivot-0")
    with federation.connect("operator") as operator:
        operator.import_pivot("pivot-0", work / "pivot-0")


def _tell(both: Sequence[Fleet], command: str) -> Tally:
    return sum((fleet.tell(command) for fleet in both), Tally())


def _attend(
    both: Sequence[Fleet], server: psutil.Process, participants: int, window_s: float
) -> Attending:
    _tell(both, "begin")  # answered once both processes are up
    began = time.monotonic()
    while (here := _tell(both, "tally")).attending < participants:
        if time.monotonic() - began > READY_S:
            raise ManyError(f"found {here.attending} of {participants} attending: {here.failures}")
        time.sleep(0.2)
    arrival_s = time.monotonic() - began
    _tell(both, "begin")
    with _Load(server) as load:
        time.sleep(window_s)
    tally = _tell(both, "prove")
    if len(tally.latencies_s) < 2:
        raise ManyError(f"found {len(tally.latencies_s)} answers in {window_s} s: {tally.failures}")
    return Attending(
        cpu_cores=load.cores,
        rss_mib=load.rss_mib,
        p99_ms=_p99_ms(tally),
        median_ms=round(statistics.median(tally.latencies_s) * 1000, 1),
        missed=tally.missed,
        beats=tally.beats,
        arrival_s=round(arrival_s, 1),
    )


def _hold_round(
    both: Sequence[Fleet],
    server: psutil.Process,
    researcher: Coordinator,
    names: Sequence[str],
    work: Path,
    database: Path,
) -> Collected:
    """Submit, wait until all reports are in, cancel the fusion, and compare the promises."""
    write_prompts(work / "prompts.jsonl", PROMPTS)
    spec = RoundSpec(
        name="all",
        pivot="pivot-0",
        participants=tuple(names),
        kind="logits",
        method="unified",
        prompts="prompts.jsonl",
        top_k=1,
        training=TrainingSpec(steps=1, lr=1e-3, seq_len=16, warmup_steps=0),
        deadline_minutes=COLLECT_MINUTES,
    )
    _tell(both, "begin")
    began = time.monotonic()
    with _Load(server) as load:
        round_id = researcher.submit(spec, folder=work)
        state = _collected_state(researcher, round_id)
        seconds = time.monotonic() - began
    if state == "FUSING":
        researcher.cancel(round_id)
    tally = _tell(both, "prove")
    if state != "FUSING":
        found = researcher.round(round_id)
        raise ManyError(f"the round is {state}: {found.detail[:500]}; {tally.failures[:3]}")
    promised = {(one.participant, one.sha256) for one in tally.receipts}
    return Collected(
        receipts=len(promised),
        lost_receipts=len(promised - committed(database, round_id)),
        collect_s=round(seconds, 1),
        collect_cpu_cores=load.cores,
        collect_rss_mib=load.rss_mib,
        collect_p99_ms=_p99_ms(tally),
        collect_missed=tally.missed,
        engine_retries=tally.retries,
        failures=len(tally.failures),
    )


def _collected_state(researcher: Coordinator, round_id: str) -> str:
    for event in researcher.watch(round_id):
        if event.kind == "state" and event.body["state"] not in (
            "SUBMITTED",
            "APPROVED",
            "COLLECTING",
        ):
            return str(event.body["state"])
    return researcher.round(round_id).state


def committed(database: Path, round_id: str) -> set[tuple[str, str]]:
    """(participant, sha256) of every contribution that the store counts."""
    query = "SELECT participant, sha256 FROM contributions WHERE round_id = ? AND status = ?"
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as db:
        return set(db.execute(query, (round_id, "committed")))


def _p99_ms(tally: Tally) -> float:
    if len(tally.latencies_s) < 2:
        return 0.0
    return round(statistics.quantiles(tally.latencies_s, n=100, method="inclusive")[-1] * 1000, 1)


class _Load:
    """What one process used while the block ran."""

    def __init__(self, process: psutil.Process) -> None:
        self._process = process
        self.cores = self.rss_mib = 0.0

    def __enter__(self) -> "_Load":
        self._began, self._used_s = time.monotonic(), self._cpu_s()
        return self

    def __exit__(self, *_error: object) -> None:
        seconds = time.monotonic() - self._began
        self.cores = round((self._cpu_s() - self._used_s) / seconds, 3)
        self.rss_mib = round(self._process.memory_info().rss / 2**20, 1)

    def _cpu_s(self) -> float:
        times = self._process.cpu_times()
        return float(times.user + times.system)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure each size and print one line for it; with --json, an object at the end."""
    parser = argparse.ArgumentParser(description="Many participants at one coordinator.")
    parser.add_argument("--participants", type=int, nargs="+", default=[100, 300, 1000])
    parser.add_argument("--window", type=float, default=60.0, help="seconds of attending")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, last")
    arguments = parser.parse_args(argv)
    found = {}
    for participants in arguments.participants:
        found[str(participants)] = figures = measure(participants, window_s=arguments.window)
        words = "  ".join(f"{key} {value}" for key, value in figures.items())
        sys.stderr.write(f"{participants} participants: {words}\n")
    if arguments.json:
        sys.stdout.write(json.dumps({"participants": found}) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
