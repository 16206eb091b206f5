"""The coordinator's figures for Prometheus: what its database, disk and certificates say now.

Read when somebody asks. Counters follow the rounds' story in the database, so that they go on
after a restart where they were.
"""

import json
import shutil
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from cryptography import x509
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from coordinator.metrics import LIVE
from coordinator.rounds import FINAL, State
from coordinator.store import EventRow, Store

_HOUR: Final = 3600.0
_BUCKETS: Final = (
    60,
    300,
    900,
    _HOUR,
    4 * _HOUR,
    12 * _HOUR,
    *(d * 24 * _HOUR for d in (1, 3, 7, 30)),
)
_STAGES: Final = {State.FUSING: "fusing", State.EVALUATING: "evaluating"}


class Beat(Protocol):
    """What a participant that attends said last."""

    @property
    def seen_unix_ms(self) -> int:
        """When, by our clock."""

    @property
    def clock_skew_ms(self) -> int:
        """Its clock less ours."""


class Figures(Collector):
    """Every metric of one coordinator.

    Args: certificates: PEM files by kind. attending: the participants that are connected now, by
        name; None: no beat of theirs has come yet.
    """

    def __init__(
        self,
        store: Store,
        data_dir: Path,
        certificates: Mapping[str, Path],
        attending: Callable[[], Mapping[str, Beat | None]],
    ) -> None:
        self._store = store
        self._data_dir = data_dir
        self._certificates = certificates
        self._attending = attending
        self._lock = threading.Lock()
        self._seq = 0
        self._rounds: dict[str, tuple[State, int, int]] = {}
        """State, when it was submitted, when it came into the state (Unix ms)."""
        self._kinds: dict[str, str] = {}
        self._contributions = Counter(
            "fed_contributions",
            "Answers of participants, by what the round asks for and how it ended.",
            ["kind", "result"],
            registry=None,
        )
        self._durations = Histogram(
            "fed_round_duration_seconds",
            "From submission to the final state.",
            buckets=_BUCKETS,
            registry=None,
        )
        self._fusion = Histogram(
            "fed_fusion_seconds", "Stages of fusion.", ["stage"], buckets=_BUCKETS, registry=None
        )
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        for metric in (*LIVE, self):
            self._registry.register(metric)

    def describe(self) -> list[Metric]:
        """Nothing yet: to register must not read the database."""
        return []

    def text(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Read what is new, then say how things stand."""
        with self._lock:
            for round_id, event in self._store.news(self._seq):
                self._take(round_id, event, json.loads(event.body_json))
                self._seq = event.seq
            yield self._states()
            for metric in (self._contributions, self._durations, self._fusion):
                yield from metric.collect()
        versions = [int(row.name.partition("-")[2]) for row in self._store.pivots()]
        yield _gauge(
            "fed_pivot_version",
            "Number of the newest pivot; -1: none yet.",
            max(versions, default=-1),
        )
        yield from self._nodes()
        free = shutil.disk_usage(self._data_dir).free
        yield _gauge("fed_store_free_bytes", "Free space where the state is kept.", free)
        yield self._expiries()

    def _take(self, round_id: str, event: EventRow, body: Mapping[str, Any]) -> None:
        if event.kind == "contribution":
            self._contributions.labels(self._kind(round_id), body["status"]).inc()
            return
        state, now = State(body["state"]), event.time_unix_ms
        before, submitted, entered = self._rounds.get(round_id, (state, now, now))
        if before in _STAGES and state is not before:
            self._fusion.labels(_STAGES[before]).observe((now - entered) / 1000)
        if state in FINAL:
            self._durations.observe((now - submitted) / 1000)
            self._kinds.pop(round_id, None)
        self._rounds[round_id] = (state, submitted, now)

    def _kind(self, round_id: str) -> str:
        if round_id not in self._kinds:
            spec = json.loads(self._store.round(round_id).spec_json)
            self._kinds[round_id] = str(spec["kind"])
        return self._kinds[round_id]

    def _states(self) -> Metric:
        found = Tally(state for state, _, _ in self._rounds.values())
        metric = GaugeMetricFamily("fed_rounds", "Rounds by state.", labels=["state"])
        for state in State:
            metric.add_metric([state], found[state])
        return metric

    def _nodes(self) -> Iterator[Metric]:
        beats, now = self._attending(), time.time() * 1000
        yield _gauge("fed_nodes_online", "Participants connected now.", len(beats))
        seen = GaugeMetricFamily(
            "fed_node_last_seen_seconds", "Since a participant's last beat.", labels=["node"]
        )
        skew = GaugeMetricFamily(
            "fed_node_clock_skew_seconds", "A participant's clock less ours.", labels=["node"]
        )
        for name, beat in beats.items():
            if beat is not None:
                seen.add_metric([name], (now - beat.seen_unix_ms) / 1000)
                skew.add_metric([name], beat.clock_skew_ms / 1000)
        yield from (seen, skew)

    def _expiries(self) -> Metric:
        metric = GaugeMetricFamily(
            "fed_cert_expiry_seconds", "Until a certificate ends.", labels=["kind"]
        )
        for kind, path in self._certificates.items():
            ends = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
            metric.add_metric([kind], ends.timestamp() - time.time())
        return metric


def _gauge(name: str, words: str, value: float) -> Metric:
    return GaugeMetricFamily(name, words, value=value)
