"""The figures say what is on disk, go on after a restart, and cost only what is new."""

from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator import queries, round_rows
from coordinator.figures import Figures
from coordinator.metrics import observe_rpc
from coordinator.rounds import Event, State
from coordinator.store import Store
from protos.messages import FileRef
from trust.ca import create_authority

SPEC = '{"kind": "logits", "participants": ["a", "b"]}'
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Said:
    seen_unix_ms: int
    clock_skew_ms: int


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.at(tmp_path / "store.sqlite")


@pytest.fixture
def figures(store: Store, tmp_path: Path) -> Figures:
    return _figures(store, tmp_path)


def _figures(store: Store, tmp_path: Path) -> Figures:
    if not (tmp_path / "ca").exists():
        create_authority(tmp_path / "ca", "test")
    beats = {"st-mary": Said(0, -2500), "new": None}
    return Figures(store, tmp_path, {"authority": tmp_path / "ca" / "ca.pem"}, lambda: beats)


def _read(figures: Figures) -> dict[str, float]:
    """Name and labels -> value, as a Prometheus server reads it."""
    return {
        sample.name
        + "".join(f"|{sample.labels[key]}" for key in sorted(sample.labels)): sample.value
        for family in text_string_to_metric_families(figures.text().decode())
        for sample in family.samples
    }


def _publish(store: Store, monkeypatch: pytest.MonkeyPatch, number: int) -> str:
    """A round through its life: fusing 100 s, evaluating 20 s, 1,000 s in all."""
    clock = [10**12]
    for module in (queries, round_rows):
        monkeypatch.setattr(module, "now_unix_ms", lambda: clock[0])
    round_id = store.submit_round(
        request_id=f"r{number}", submitted_by="ada", spec_json=SPEC, deadline_ms=10**6
    ).round_id
    steps = ((Event.APPROVE, 0), (Event.ISSUE, 10), (Event.COLLECTED, 870), (Event.FUSED, 100))
    for event, after_s in (*steps, (Event.EVALUATED, 20)):
        clock[0] += after_s * 1000
        if event is Event.COLLECTED:
            store.commit(round_id, "a", "0" * 64, 5)
            store.report(round_id, "b", "refused", "no", "{}")
        store.advance(round_id, event)
    return round_id


def test_rounds_are_counted_by_state_and_timed(
    store: Store, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _read(figures)["fed_pivot_version"] == -1
    _publish(store, monkeypatch, 1)
    store.submit_round(request_id="x", submitted_by="ada", spec_json=SPEC, deadline_ms=1)
    found = _read(figures)
    assert {s: found[f"fed_rounds|{s}"] for s in State if found[f"fed_rounds|{s}"]} == {
        "PUBLISHED": 1,
        "SUBMITTED": 1,
    }
    assert found["fed_round_duration_seconds_sum"] == 1000
    assert found["fed_fusion_seconds_sum|fusing"] == 100
    assert found["fed_fusion_seconds_sum|evaluating"] == 20
    assert found["fed_contributions_total|logits|committed"] == 1
    assert found["fed_contributions_total|logits|refused"] == 1


def test_counters_go_on_after_a_restart(
    store: Store, figures: Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        _publish(store, monkeypatch, number)
        before = _read(figures)
    after = _read(_figures(Store.at(tmp_path / "store.sqlite"), tmp_path))
    for key in before:
        if key.startswith(("fed_round", "fed_contributions", "fed_fusion", "fed_pivot")):
            assert "created" in key or after[key] == before[key], key


def test_only_news_is_read(store: Store, figures: Figures, monkeypatch: pytest.MonkeyPatch) -> None:
    _publish(store, monkeypatch, 1)
    asked: list[int] = []
    news = store.news
    monkeypatch.setattr(store, "news", lambda seq: asked.append(seq) or news(seq))
    _read(figures)
    _read(figures)
    assert asked == [0, max(e.seq for e in store.events("rnd-1"))]


def test_nodes_certificates_pivots_and_disk(store: Store, figures: Figures) -> None:
    for name in ("pivot-0", "pivot-12", "pivot-3"):
        file = FileRef(name="model.safetensors", sha256="0" * 64, size_bytes=1)
        store.add_pivot(name=name, parent="", round_id="", files=[file], evals_json="{}")
    found = _read(figures)
    assert found["fed_pivot_version"] == 12
    assert found["fed_nodes_online"] == 2
    assert found["fed_node_clock_skew_seconds|st-mary"] == -2.5
    assert found["fed_node_last_seen_seconds|st-mary"] > 1e9
    assert "fed_node_last_seen_seconds|new" not in found
    assert found["fed_cert_expiry_seconds|authority"] > 365 * 24 * 3600
    assert found["fed_store_free_bytes"] > 0
    assert found["process_open_fds"] > 0


def test_calls_are_timed_and_denials_counted(figures: Figures) -> None:
    before = _read(figures)
    method = "/cofuse.v1.Test/Call"
    observe_rpc(method, grpc.StatusCode.OK, 0.01)
    observe_rpc(method, grpc.StatusCode.PERMISSION_DENIED, 0.02)
    found = _read(figures)
    assert found[f"fed_rpc_seconds_count|OK|{method}"] == 1
    assert found[f"fed_rpc_seconds_sum|PERMISSION_DENIED|{method}"] == pytest.approx(0.02)
    denied = "fed_auth_denied_total|permission_denied"
    assert found[denied] == before.get(denied, 0) + 1


def test_two_coordinators_in_one_process_do_not_share_their_rounds(
    store: Store, figures: Figures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _publish(store, monkeypatch, 1)
    other = _figures(Store.at(tmp_path / "other.sqlite"), tmp_path)
    assert _read(figures)["fed_rounds|PUBLISHED"] == 1
    assert _read(other)["fed_rounds|PUBLISHED"] == 0
