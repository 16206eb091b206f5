"""A researcher's ways through command line and SDK, against a coordinator that has done rounds."""

import asyncio
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

import cofuse
from cofuse import AsyncCoordinator, Coordinator, FusionRound, RoundFailedError, WaitTimedOutError
from cofuse.cli import app
from coordinator.rounds import Event
from coordinator.wiring import serving
from protos.messages import FileRef
from protos.spec import RoundSpec
from tests.cofuse.envelope import told
from tests.coordinator.archive import Archive
from tests.integration.conftest import config_at, identities_at
from trust.pivot_manifest import SIGNER_FILE

Run = Callable[..., Result]
ROOT = Path(__file__).parents[2]
NAMES = ["st-mary", "st-luke"]
SPEC = {
    "name": "first",
    "pivot": "pivot-0",
    "participants": NAMES,
    "kind": "logits",
    "method": "unified",
    "prompts": "prompts.jsonl",
    "training": {"steps": 2, "lr": 0.001},
}
TEXTS = ["A stenosis of the valve.", "An arrhythmia."]


class Past(Archive):
    """Rounds with whole specs, whose pivots were evaluated."""

    def collecting(self, request_id: str, pivot: str) -> str:
        spec = SPEC | {"pivot": pivot, "prompts": f"sha256:{self.put(b'prompts')}"}
        for number, name in enumerate(NAMES):
            self.store.upsert_participant(name, number + 1, name.encode())
        round_id = self.store.submit_round(
            request_id=request_id,
            submitted_by="ada",
            spec_json=json.dumps(spec | {"seed": len(request_id)}),
            deadline_ms=3_600_000,
        ).round_id
        for event in (Event.APPROVE, Event.ISSUE):
            self.store.advance(round_id, event)
        return round_id

    def pivot(self, name: str, parent: str, round_id: str) -> None:
        content = f"weights of {name}".encode()
        file = FileRef(name="model.safetensors", sha256=self.put(content), size_bytes=len(content))
        bpb = {"base": {"heart": 3.0, "brain": 4.0}, "unified": {"heart": 2.0, "brain": 3.5}}
        evals = {"bpb": bpb, "accuracy": {}, "credit": {}, "pivot": "unified"}
        self.store.add_pivot(
            name=name,
            parent=parent,
            round_id=round_id,
            files=[file],
            evals_json=json.dumps(evals if parent else {}),
        )


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """An address, and a researcher's folder: rnd-1 and rnd-2 are published, rnd-3 is cancelled."""
    root = tmp_path_factory.mktemp("surface")
    identities = identities_at(root)
    files = identities("researcher", "ada")
    config = config_at(root, identities)
    past = Past.opened(config.data_dir)
    past.pivot("pivot-0", "", "")
    past.published("seven--", past.published("one", "pivot-0"))
    past.store.advance(past.collecting("three", "pivot-2"), Event.CANCEL, detail="no need")
    past.store.close()
    with serving(config) as running:
        for public in ("ca.pem", SIGNER_FILE):
            (files.key.parent / public).write_bytes(files.ca.with_name(public).read_bytes())
        (files.key.parent / "prompts.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8"
        )
        yield running.address, files.key.parent


@pytest.fixture
def run(hub: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """cofuse in a folder of its own, logged in: no command needs --at or --identity."""
    monkeypatch.setenv("COFUSE_PROFILE", str(tmp_path / "profile.toml"))
    monkeypatch.chdir(tmp_path)

    def call(*words: str, status: int = 0) -> Result:
        done = CliRunner().invoke(app, list(words))
        assert done.exit_code == status, done.stdout + done.stderr
        return done

    call("login", hub[0], str(hub[1]))
    return call


def spec_at(folder: Path, **changes: object) -> Path:
    path = folder / "round.yaml"
    path.write_text(yaml.safe_dump(SPEC | changes), encoding="utf-8")
    return path


def test_the_researchers_page_is_true(run: Run, hub: tuple[str, Path], tmp_path: Path) -> None:
    """Its commands run, in order, and show what it says; so does its Python."""
    page = (ROOT / "docs" / "researcher.md").read_text(encoding="utf-8")
    (tmp_path / "me").symlink_to(hub[1])
    (tmp_path / "prompts.jsonl").write_bytes((hub[1] / "prompts.jsonl").read_bytes())
    specs = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    first, *others = map(yaml.safe_load, specs)
    assert first == SPEC
    for spec in others:
        RoundSpec.model_validate(spec)
    spec_at(tmp_path)
    shown: list[str] = []
    for line in "".join(re.findall(r"^```console\n(.*?)^```$", page, re.M | re.S)).splitlines():
        if line.startswith("$ cofuse "):
            words = shlex.split(line.replace("fuse.example.org:7443", hub[0]))
            shown = run(*words[2:]).stdout.splitlines()
        else:
            wanted = re.compile(".*".join(re.escape(part) for part in line.split("...")))
            assert any(wanted.fullmatch(found.rstrip()) for found in shown), (line, shown)
    [code] = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(compile(code, "researcher.md", "exec"), {})


def test_one_login_serves_every_later_command(run: Run) -> None:
    assert [row["participant"] for row in told(run("ps", "--json").stdout)["participants"]] == [
        *sorted(NAMES)
    ]
    assert "rnd-1    PUBLISHED   first" in run("round", "ls").stdout
    assert run("config", "--origin").stdout.count("# cofuse login, ") == 2
    run("logout")
    missing = run("round", "ls", "--json", status=2)
    assert json.loads(missing.stdout)["error"]["code"] == "no_connection"


def test_a_published_round_is_read_from_all_sides(run: Run) -> None:
    log = run("round", "log", "rnd-1", "--participant", "st-luke").stdout.splitlines()
    assert len(log) == 1
    assert "contribution participant=st-luke status=committed" in log[0]
    table = run("round", "evals", "rnd-1").stdout
    assert "unified *  2.000  3.500  2.750" in table
    assert "bpb,unified,brain,3.5,True" in run("round", "evals", "rnd-1", "--csv").stdout
    assert run("round", "evals", "rnd-3", status=1).stderr.startswith("error: rnd-3 is CANCELLED")
    diff = told(run("round", "diff", "rnd-1", "rnd-2", "--json").stdout)
    assert diff["spec"] == {"pivot": ["pivot-0", "pivot-1"], "seed": [3, 7]}
    assert [row["second"] - row["first"] for row in diff["scores"]] == [0, 0]


def test_a_round_that_made_no_pivot_ends_its_watcher_with_its_words(run: Run) -> None:
    ended = run("round", "watch", "rnd-3", "--json", status=1)
    said = json.loads(ended.stdout)
    assert (said["error"]["code"], said["data"]["state"]) == ("not_published", "CANCELLED")
    lines = run("round", "watch", "rnd-3", "--jsonl", status=1).stdout.splitlines()
    *events, last = (json.loads(line) for line in lines)
    assert last == said
    assert [event["body"]["state"] for event in events if event["kind"] == "state"][
        -1
    ] == "CANCELLED"
    logged = run("round", "log", "rnd-3", "--jsonl").stdout.splitlines()
    assert [json.loads(line) for line in logged[:-1]] == events
    unknown = run("round", "show", "rnd-99", "--json", status=2)
    assert json.loads(unknown.stdout)["error"]["code"] == "unknown_round"


def test_check_online_knows_the_names_and_what_rounds_like_it_took(
    run: Run,
    hub: tuple[str, Path],
) -> None:
    found = told(run("round", "check", str(spec_at(hub[1])), "--online", "--json").stdout)
    assert found["coordinator"]["attending"] == dict.fromkeys(NAMES, False)
    assert found["coordinator"]["done_before"]["st-mary"]["round_id"] == "rnd-2"
    path = str(spec_at(hub[1], participants=["st-mery"]))
    assert "did you mean 'st-mary'?" in run("round", "check", path, "--online", status=2).stderr


def test_a_lock_makes_the_same_round_again_or_says_what_changed(
    run: Run,
    hub: tuple[str, Path],
) -> None:
    home = hub[1]
    lock = Path(run("round", "lock", str(spec_at(home))).stdout.strip())
    assert FusionRound.load(lock).spec == FusionRound.load(home / "round.yaml").spec
    first = run("round", "submit", str(lock), "--idempotency-key", "x").stdout
    assert run("round", "submit", str(lock), "--idempotency-key", "x").stdout == first
    locked = yaml.safe_load(lock.read_text())
    lock.write_text(yaml.safe_dump(locked | {"pivot": {**locked["pivot"], "name": "pivot-1"}}))
    assert "found another pivot-1" in run("round", "submit", str(lock), status=2).stderr
    lock.write_text(yaml.safe_dump(locked))
    prompts = (home / "prompts.jsonl").read_bytes()
    (home / "prompts.jsonl").write_bytes(prompts + b'{"text": "more"}\n')
    try:
        assert "bring the old file back" in run("round", "submit", str(lock), status=2).stderr
    finally:
        (home / "prompts.jsonl").write_bytes(prompts)
    done = told(run("round", "lock", "rnd-2", "--json").stdout)
    assert [part["participant"] for part in done["outcome"]["inputs"]] in (NAMES, NAMES[::-1], [])
    assert done["outcome"]["pivot"]["name"] == "pivot-2"


def test_the_sdk_waits_evaluates_and_says_why_there_is_nothing(
    run: Run,
    hub: tuple[str, Path],
) -> None:
    with Coordinator.from_login(*hub) as coordinator:
        done = coordinator.follow("rnd-1")
        assert done.wait(timeout=60).pivot_name == "pivot-1"
        assert done.evals().means("bpb") == {"base": 3.5, "unified": 2.75}
        with pytest.raises(RoundFailedError, match="rnd-3 ended CANCELLED: no need") as failed:
            coordinator.follow("rnd-3").wait()
        assert (failed.value.code, failed.value.events[-1].body["state"]) == (*("CANCELLED",) * 2,)
        asked = FusionRound(folder=hub[1], **SPEC)
        submitted = coordinator.submit(asked, request_id="y")
        assert coordinator.submit(asked, request_id="y") == submitted
        with pytest.raises(WaitTimedOutError, match="it goes on"):
            submitted.wait(timeout=0.3)
        assert submitted.cancel().state == "CANCELLED"


def test_the_async_twin_says_the_same(hub: tuple[str, Path]) -> None:
    async def walk() -> list[str]:
        async with AsyncCoordinator.from_login(*hub) as coordinator:
            final = await coordinator.wait("rnd-1", timeout_s=60)
            told = [event.kind async for event in coordinator.watch("rnd-1")]
            assert (await coordinator.evals(final.pivot_name)).pivot == "unified"
            return told

    assert asyncio.run(walk()).count("contribution") == 2


def test_the_front_door_names_all_it_offers() -> None:
    assert cofuse.__all__ == sorted(cofuse.__all__)
    assert all(getattr(cofuse, name) for name in cofuse.__all__)
