"""A member is out of every pivot since, and the others are in it as before."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cofuse.cli import app
from cofuse.commands import withdrawals
from cofuse.sdk import Pivot, Round
from cofuse.withdrawal import WithdrawalError, held_since, holding, withdraw, without
from protos.spec import RoundSpec
from trust.pivot_manifest import Input, Manifest, Parent, PivotFile

DIGEST = "0" * 64


def manifest(
    number: int, members: str = "", parent: int | None = None, again: int = -1
) -> Manifest:
    """pivot-<number>, made of its parent (by default the one before) by members a, b, c."""
    before = number - 1 if parent is None else parent
    return Manifest(
        name=f"pivot-{number}",
        root="pivot-0",
        parent=Parent(name=f"pivot-{before}", content_sha256=DIGEST) if number else None,
        files=(PivotFile(name="model.safetensors", sha256=DIGEST, size_bytes=1),),
        created="2026-01-01T00:00:00Z",
        round_id=f"rnd-{number}" if members else "",
        method="logits unified",
        restores=f"pivot-{again}" if again >= 0 else "",
        inputs=tuple(Input(participant=m, sha256=DIGEST, size_bytes=1) for m in members),
        evals={},
        issued="2026-01-01T00:00:00Z",
        expires="2026-02-01T00:00:00Z",
        signer=DIGEST,
    )


LINE = [manifest(0), manifest(1, "ab"), manifest(2, "abc"), manifest(3, "ab")]


def names(steps: Sequence[Manifest]) -> list[str]:
    return [step.name for step in steps]


@pytest.mark.parametrize(
    ("member", "held", "clean"),
    [
        ("c", ["pivot-2", "pivot-3"], "pivot-1"),
        ("a", ["pivot-1", "pivot-2", "pivot-3"], "pivot-0"),
        ("nobody", [], "pivot-3"),
    ],
)
def test_what_holds_a_member_is_what_it_was_in_and_all_that_was_made_of_it(
    member: str, held: list[str], clean: str
) -> None:
    found = holding(LINE, member)
    assert (list(found.pivots), found.clean) == (held, clean)
    assert names(found.steps) == held


def test_what_was_rolled_back_holds_what_the_pivot_held_whose_files_it_has() -> None:
    back = [*LINE[:3], manifest(3, parent=2, again=1), manifest(4, "ab")]
    found = holding(back, "c")
    assert found.pivots == ("pivot-2",)
    assert found.steps == ()  # neither the newest nor what it stands on
    assert names(holding(back, "a").steps) == ["pivot-1", "pivot-4"]


def spec(members: str, **changes: Any) -> RoundSpec:
    values = {
        "name": "x",
        "pivot": "pivot-0",
        "participants": list(members),
        "kind": "logits",
        "method": "unified",
        "prompts": f"sha256:{DIGEST}",
        "training": {"steps": 1, "lr": 0.1},
    }
    return RoundSpec.model_validate({**values, **changes})


def test_the_round_is_the_same_but_for_the_member_and_the_pivot() -> None:
    before = spec("abc", quorum=3, seed=7)
    after = without(before, "b", "pivot-9")
    assert after == spec("ac", quorum=2, seed=7, pivot="pivot-9")
    assert RoundSpec.model_validate(json.loads(after.model_dump_json())) == after
    assert without(spec("b"), "b", "pivot-9") is None


class Hub:
    """A coordinator whose rounds end as told; it keeps what it was asked."""

    def __init__(self, line: Sequence[Manifest] = LINE, ends: str = "PUBLISHED") -> None:
        self.line, self.ends = list(line), ends
        self.submitted: dict[str, RoundSpec] = {}

    def participants(self) -> dict[str, bool]:
        return dict.fromkeys("abc", True)

    def pivots(self) -> list[Pivot]:
        return [Pivot(m.name, "", m.round_id, (), {}) for m in self.line]

    def lineage(self, name: str) -> list[Manifest]:
        assert name == self.line[-1].name
        return self.line

    def roll_back_pivot(self, name: str) -> Pivot:
        known = {m.name: m for m in self.line}
        assert known[name].parent is not None
        return Pivot("pivot-90", name, "", (), {})

    def round(self, round_id: str) -> Round:
        known = {m.round_id: m for m in self.line}
        members = "".join(part.participant for part in known[round_id].inputs)
        return Round(round_id, "PUBLISHED", "", known[round_id].name, spec(members), ())

    def submit(self, spec: RoundSpec, *, request_id: str) -> str:
        self.submitted.setdefault(request_id, spec)
        return f"again-{list(self.submitted).index(request_id)}"

    def wait(self, round_id: str) -> Round:
        number = int(round_id.rpartition("-")[2])
        made = f"pivot-{91 + number}" if self.ends == "PUBLISHED" else ""
        found = list(self.submitted.values())[number]
        return Round(round_id, self.ends, "nobody came", made, found, ())


def test_each_round_since_is_repeated_on_what_the_one_before_made() -> None:
    hub = Hub()
    done = withdraw(hub, "pivot-3", "a", lambda _: None)
    asked = [(s.pivot, "".join(s.participants)) for s in hub.submitted.values()]
    assert asked == [("pivot-90", "b"), ("pivot-91", "bc"), ("pivot-92", "b")]
    assert done.pivot == "pivot-93"
    withdraw(hub, "pivot-3", "a", lambda _: None)  # as after a break
    assert len(hub.submitted) == 3


def test_a_round_of_the_member_alone_leaves_nothing_to_repeat() -> None:
    line = [manifest(0), manifest(1, "a"), manifest(2, "ab")]
    hub = Hub(line)
    assert withdraw(hub, "pivot-2", "a", lambda _: None).rounds == ("again-0",)
    assert [s.pivot for s in hub.submitted.values()] == ["pivot-90"]


def test_whom_nothing_holds_changes_nothing() -> None:
    hub = Hub()
    assert withdraw(hub, "pivot-3", "nobody", lambda _: None).pivot == "pivot-3"
    assert not hub.submitted


def test_a_round_that_fails_leaves_a_pivot_without_the_member_and_says_what_is_left() -> None:
    with pytest.raises(WithdrawalError, match=r"pivot-90 holds nothing of a .* rnd-1, rnd-2"):
        withdraw(Hub(ends="EXPIRED"), "pivot-3", "a", lambda _: None)


@pytest.mark.parametrize(("members", "held"), [("bc", ("pivot-4",)), ("b", ())])
def test_what_an_open_round_made_meanwhile_is_named_when_it_holds_the_member(
    members: str, held: tuple[str, ...]
) -> None:
    hub = Hub([*LINE, manifest(4, members, parent=1)])
    before = [made.name for made in LINE]
    assert held_since(hub, "c", before) == held
    assert held_since(hub, "c", [*before, "pivot-4"]) == ()


def test_the_command_tells_in_json_what_it_did(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from contextlib import nullcontext

    hub = Hub()
    monkeypatch.setattr(withdrawals, "connected", lambda *_: nullcontext(hub))
    where = ["--at", "h:1", "--identity", str(tmp_path), "--json"]
    dry = CliRunner().invoke(app, ["withdraw", "c", "--dry-run", *where])
    assert json.loads(dry.stdout)["data"]["to_repeat"] == ["rnd-2", "rnd-3"]
    assert not hub.submitted
    done = CliRunner().invoke(app, ["withdraw", "c", *where])
    told = json.loads(done.stdout)["data"]
    assert (told["clean"], told["pivot"], told["rounds"]) == (
        "pivot-1",
        "pivot-92",
        ["again-0", "again-1"],
    )
    before = len(hub.submitted)
    slip = CliRunner().invoke(app, ["withdraw", "bb", *where])
    assert slip.exit_code == 2
    assert "found the member 'bb', wanted one of a, b, c" in slip.stderr
    assert len(hub.submitted) == before
    hub.ends = "EXPIRED"
    failed = CliRunner().invoke(app, ["withdraw", "a", *where])
    assert failed.exit_code == 1
    assert "cofuse withdraw a --pivot pivot-3" in failed.stderr
