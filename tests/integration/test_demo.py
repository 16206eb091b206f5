"""`cofuse demo` as a program: what it answers, and that it ends everything it started."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cofuse.demo.present import show_result, write_report
from cofuse.demo.result import DemoPlan, DemoResult, claims
from cofuse.demo.run import DemoError, _clear, run_demo
from cofuse.demo.screen import screen
from cofuse.demo.settings import TINY

pytestmark = pytest.mark.timeout(300)


def test_a_demo_answers_with_all_its_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = DemoPlan(
        out=tmp_path / "out",
        settings=TINY,
        hospitals=TINY.hospitals[:2],
        rounds=("logits-pairwise",),
        seed=1,
        source="sample",
    )
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    with screen() as talk:
        result = run_demo(plan, talk)
    answer = json.loads(json.dumps(result.as_json()))
    names = [hospital.name for hospital in plan.hospitals]
    domains = {hospital.department for hospital in plan.hospitals}
    experts = {f"expert:{name}" for name in names}
    assert set(answer["bpb"]) == {"base", "pairwise", *experts}
    assert all(set(scores) == domains for scores in answer["bpb"].values())
    assert set(answer["pivots"]) == {"pairwise"}
    assert all(
        (Path(folder) / "model.safetensors").exists() for folder in answer["pivots"].values()
    )
    assert set(answer["bytes_left"]) == set(names)
    assert min(answer["bytes_left"].values()) > 10_000
    assert answer["peak_rss_mb"] > 500
    assert {one["domain"] for one in answer["chat"]} == domains
    assert all(one["question"] and one["right"] for one in answer["chat"])
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
    report = write_report(plan, result)
    show_result(result, report, to_stderr=False)
    shown = capsys.readouterr().out
    assert all(f"{x:.3f}" in shown for scores in answer["bpb"].values() for x in scores.values())
    assert all(one.right in shown for one in result.chat)
    page = report.read_text(encoding="utf-8")
    assert "pairwise" in page
    assert "What the pivot answers" in page


@pytest.mark.slow
def test_ctrl_c_ends_everything_it_started(tmp_path: Path) -> None:
    demo = _training_demo(tmp_path)
    children = psutil.Process(demo.pid).children(recursive=True)
    assert len(children) >= 3  # the coordinator and two hospitals; more as work begins
    demo.send_signal(signal.SIGINT)
    out, err = demo.communicate(timeout=60)
    assert demo.returncode == 130, err
    assert "nothing is left running" in err
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert out == ""


@pytest.mark.slow
def test_a_killed_demo_takes_its_processes_along(tmp_path: Path) -> None:
    demo = _training_demo(tmp_path)
    children = psutil.Process(demo.pid).children(recursive=True)
    demo.kill()
    demo.wait()
    end = time.monotonic() + 40
    while any(child.is_running() and child.status() != "zombie" for child in children):
        assert time.monotonic() < end, [child for child in children if child.is_running()]
        time.sleep(0.2)


def test_another_folder_is_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(DemoError, match="--out"):
        _clear(tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_claim_fails_when_its_numbers_say_so() -> None:
    good = {
        "base": {"a": 3.0, "b": 3.0},
        "sft": {"a": 2.5, "b": 2.5},
        "expert:x": {"a": 1.0, "b": 4.0},
        "unified": {"a": 2.0, "b": 2.0},
    }
    assert DemoResult(claims=claims(good)).ok
    for model, domain, worse in (
        ("base", "b", 1.9),
        ("sft", "a", 1.0),
        ("expert:x", "b", 2.5),
    ):
        bad = {**good, model: {**good[model], domain: worse}}
        assert not DemoResult(claims=claims(bad)).ok


def _training_demo(folder: Path) -> "subprocess.Popen[str]":
    """Start the demo as a program and wait until it trains."""
    demo = subprocess.Popen(
        [
            *(sys.executable, "-m", "cofuse.cli", "demo", "--quick", "--participants", "2"),
            *("--out", str(folder / "out")),
        ],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert demo.stderr is not None
    for line in demo.stderr:
        if "pre-training" in line:
            break
    return demo
