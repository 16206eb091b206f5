"""A federation over a network: the hub and three institutions, each in a namespace of its own.

Laid out by the rehearsal's own script. Each institution has one wire, to the hub, and the hub
passes nothing on.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pytest

from cofuse.demo.corpora import Limits, departments
from fusion.models import ModelSpec, build_model, save_model, train_tokenizer
from protos.public_sets import write_prompts
from tests.cofuse.envelope import told

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT: Final = Path(__file__).parents[2]
SCRIPT: Final = ROOT / "deploy" / "containers" / "rehearse.sh"
SITES: Final = ("st-mary", "st-john", "st-anne")
HUB: Final = "10.77.0.1"
_IP: Final = shutil.which("ip")
_SMALL = """[model]
architecture = "gpt_neox"
hidden_size = 64
layers = 1
heads = 2
vocab_size = 400

[training]
steps = 6
batch_size = 2
seq_len = 32
warmup_steps = 1

"""


class Hosts:
    """Namespaces by the name of who lives there, and what was started in them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._spaces = {name: f"cofuse-{os.getpid()}-{name}" for name in ("hub", *SITES)}
        self._started: list[subprocess.Popen[str]] = []

    def build(self) -> None:
        """Make them and the wires. Raises: subprocess.CalledProcessError where that is not ours."""
        for space in self._spaces.values():
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        hub = self._spaces["hub"]
        _ip("-n", hub, "address", "add", f"{HUB}/32", "dev", "lo")
        for number, site in enumerate(SITES, start=1):
            space, near, far = self._spaces[site], f"h{number}", "wire"
            _ip("-n", hub, "link", "add", near, "type", "veth", "peer", far, "netns", space)
            for where, wire, end in ((hub, near, 1), (space, far, 2)):
                address = f"10.77.{number}.{end}/30"
                _ip("-n", where, "address", "add", address, "dev", wire)
                _ip("-n", where, "link", "set", wire, "up")
            _ip("-n", space, "route", "add", "default", "via", f"10.77.{number}.1")
        self.run("hub", "sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_forward")

    def run(self, host: str, *words: str, check: bool = True) -> str:
        """Run to the end in a host; return stdout."""
        done = subprocess.run(
            self._there(host, words), cwd=self.folder, env=_environment(), capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def start(self, host: str, *words: str) -> None:
        """Leave it running in a host; wait for its first line."""
        with (self.folder / f"{host}.log").open("w") as log:
            process = subprocess.Popen(
                self._there(host, words), cwd=self.folder, env=_environment(),
                stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self._started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline(), (self.folder / f"{host}.log").read_text()

    def end(self) -> list[int]:
        """End all; return their statuses."""
        for process in reversed(self._started):
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(120) for process in self._started]
        self._started.clear()
        return codes

    def remove(self) -> None:
        """Leave nothing."""
        self.end()
        for space in self._spaces.values():
            subprocess.run([str(_IP), "netns", "del", space], check=False, capture_output=True)

    def _there(self, host: str, words: Sequence[str]) -> list[str]:
        return [str(_IP), "netns", "exec", self._spaces[host], *words]


def _ip(*words: str) -> None:
    subprocess.run([str(_IP), *words], check=True, capture_output=True, text=True)


def _environment() -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    # A proxy of this machine's is on another network than the hosts.
    kept = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    if _IP is None:
        pytest.skip("no `ip` here")
    made = Hosts(tmp_path)
    try:
        try:
            made.build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        yield made
    finally:
        made.remove()


def test_three_institutions_on_networks_of_their_own_make_a_pivot(hosts: Hosts) -> None:
    folder = hosts.folder
    _write_texts(folder)
    hosts.run("hub", "sh", str(SCRIPT), str(folder), HUB, *SITES)
    hosts.run("hub", "sh", str(SCRIPT), str(folder), HUB, *SITES)  # again: nothing happens
    for site in SITES:
        _make_ready(folder / site)
    hosts.start("hub", "cofuse", "coordinator", "up", "hub")
    for site in SITES:
        hosts.start(site, "cofuse", "participant", "up", site)

    def say(*words: str, who: str = "ada") -> str:
        return hosts.run("hub", "cofuse", *words, "--at", f"{HUB}:7443", "--identity", who)

    say("pivot", "push", "pivot-0", "base", who="grace")
    submitted = say("round", "submit", "round.yaml").strip()
    say("round", "approve", submitted, who="grace")
    said = say("round", "watch", submitted, "--json")
    final = told(said)
    assert (final["state"], final["pivot"]) == ("PUBLISHED", "pivot-1"), said
    say("pivot", "pull", "pivot-1")
    card = (folder / "pivot-1" / "README.md").read_text()
    assert all(f"| {site} |" in card for site in SITES)
    assert "--tasks cofuse" in card

    for site in SITES:
        listening = [line for line in hosts.run(site, "ss", "-Hltn").splitlines() if line.strip()]
        assert listening == [], f"{site} opens a port"
    # The wires lead to the hub, and no further.
    connect = "import socket, sys; socket.create_connection((sys.argv[1], 7443), 2)"
    hosts.run("st-mary", sys.executable, "-c", connect, HUB)
    beyond = hosts.run(
        "st-mary", sys.executable, "-c", f"{connect[:-4]}, 1); print('through')", "10.77.2.2",
        check=False,
    )  # fmt: skip
    assert "through" not in beyond
    assert hosts.end() == [0, 0, 0, 0]


def _make_ready(site: Path) -> None:
    """A tiny expert, and a policy that lets log-probabilities out."""
    config = site / "participant.toml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text[: text.index("[model]")] + _SMALL + text[text.index("[tls]") :])
    policy = site / "policy.toml"
    text = policy.read_text(encoding="utf-8").replace("kinds = []", 'kinds = ["logits"]')
    policy.write_text(re.sub(r'^approval = "manual"', 'approval = "auto"', text, flags=re.M))


def _write_texts(folder: Path) -> None:
    limits = Limits(private=4000, public=1500, heldout=1000, questions=3)
    names = ["cardiology", "oncology", "neurology"]
    found = departments(names, 0, limits=limits, source="sample")
    for site, department in zip(SITES, found, strict=True):
        write_prompts(folder / f"{site}.jsonl", department.private)
    public = [text for department in found for text in department.public]
    write_prompts(folder / "prompts.jsonl", public)
    evals = {
        d.name: {
            "documents": d.heldout,
            "questions": [
                {"prompt": q.prompt, "options": list(q.options), "answer": q.answer}
                for q in d.questions
            ],
        }
        for d in found
    }
    (folder / "evals.json").write_text(json.dumps({"domains": evals}), encoding="utf-8")
    tokenizer = train_tokenizer(public, 350)
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    save_model(build_model(spec, 0), tokenizer, folder / "base")
    values = {
        "name": "rehearsal",
        "pivot": "pivot-0",
        "participants": list(SITES),
        "kind": "logits",
        "method": "unified",
        "prompts": "prompts.jsonl",
        "evals": "evals.json",
        "training": {"steps": 2, "lr": 0.001, "seq_len": 32, "batch_size": 2},
    }
    (folder / "round.yaml").write_text(json.dumps(values), encoding="utf-8")
