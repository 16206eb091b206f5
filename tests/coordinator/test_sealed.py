"""What participants seal opens for the fusion worker, when their guard released it so."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from coordinator.fuse_job import FuseJob
from coordinator.fuse_worker import open_contributions
from coordinator.opener import answer
from coordinator.opening import OpenerError, Opening
from coordinator.sealed import (
    RETIRED,
    SENDERS,
    Worker,
    ensure_worker_key,
    forget_retired_keys,
    rotate_worker_key,
)
from coordinator.walls import SCRATCH
from participant.sealer import Sealer
from protos.spec import RoundSpec
from trust.keys import KeyFileError
from trust.seal import SealError, seal_file
from trust.statements import Receipt, Release, sign

SPEC = RoundSpec.model_validate(
    {
        "name": "x",
        "pivot": "pivot-0",
        "participants": ["a"],
        "kind": "logits",
        "method": "unified",
        "prompts": "sha256:" + "0" * 64,
        "training": {"steps": 1, "lr": 0.1},
    }
)


class Hub:
    """A fusion worker's folder, and participants who seal to it."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder, self.public = root, root / "worker", root / "fusion-worker.pem"
        self.kid = ensure_worker_key(self.folder, self.public)

    def sealed(self, content: bytes, participant: str = "a", **changes: Any) -> Path:
        """A contribution as a guard seals it, but for `changes` of what it says."""
        plain = self.root / "plain"
        plain.write_bytes(content)
        says: dict[str, Any] = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "round_id": "rnd-1",
            "participant": participant,
            "kind": "logits",
            "size_bytes": len(content),
            "submitted_by": "ada",
            "model": "0" * 64,
            "prompt_set": "",
            "positions": 1,
            "policy_sha256": "",
            "key": "0" * 64,
        }
        sealer = Sealer.at(participant, self.public, self.root / f"{participant}.key")
        out = self.root / f"{participant}.sealed"
        sealer.seal(Release(**{**says, **changes}), plain, out)
        return out

    def open(self, path: Path, participant: str = "a") -> bytes:
        out = self.root / "opened"
        try:
            Worker.at(self.folder).open(path, out, round_id="rnd-1", participant=participant)
        except SealError:
            assert not out.exists()
            raise
        return out.read_bytes()


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    return Hub(tmp_path)


def test_what_a_guard_sealed_opens_and_its_key_is_kept_to(hub: Hub) -> None:
    assert hub.open(hub.sealed(b"numbers")) == b"numbers"
    assert [path.name for path in (hub.folder / SENDERS).iterdir()] == ["a.pem"]
    assert hub.open(hub.sealed(b"more")) == b"more"
    (hub.root / "a.key").unlink()  # another key: somebody else's, or a participant begun anew
    path = hub.sealed(b"numbers")
    with pytest.raises(SealError, match=r"the operator removes senders/a\.pem"):
        hub.open(path)
    (hub.folder / SENDERS / "a.pem").unlink()
    assert hub.open(path) == b"numbers"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"round_id": "rnd-2"}, "for rnd-2, sent by a for rnd-1"),
        ({"participant": "b"}, "released by b"),
        ({"sha256": "0" * 64}, "not the one that was released"),
        ({"size_bytes": 1}, "not the one that was released"),
    ],
)
def test_a_release_of_something_else_opens_nothing_and_no_key_is_kept(
    hub: Hub, changes: dict[str, Any], says: str
) -> None:
    path = hub.sealed(b"numbers", **changes)
    with pytest.raises(SealError, match=says):
        hub.open(path)
    assert not list((hub.folder / SENDERS).iterdir())


def test_a_file_that_nobody_released_opens_nothing(hub: Hub) -> None:
    sealer = Sealer.at("a", hub.public, hub.root / "a.key")
    (hub.root / "plain").write_bytes(b"numbers")
    for statement in ("", "{}", sign(_receipt(), sealer.key)):
        seal_file(hub.root / "plain", hub.root / "odd", sealer.recipient, statement)
        with pytest.raises(SealError, match="its release is not to be believed"):
            hub.open(hub.root / "odd")


def _receipt() -> Receipt:
    return Receipt(
        sha256="0" * 64, round_id="rnd-1", participant="a", size_bytes=1, committed_unix_ms=1
    )


def test_the_key_is_made_once_and_never_replaced_in_silence(hub: Hub) -> None:
    assert ensure_worker_key(hub.folder, hub.public) == hub.kid
    assert hub.folder.stat().st_mode & 0o777 == 0o700
    (hub.folder / "key.pem").unlink()
    with pytest.raises(KeyFileError, match="put it back from where you keep the hub's keys"):
        ensure_worker_key(hub.folder, hub.public)


def test_the_fusion_worker_lays_out_what_it_may_open_and_older_files_as_they_are(
    hub: Hub,
) -> None:
    (hub.root / "older").write_bytes(b"of a release that did not seal")
    job = hub.root / "job"
    job.mkdir()
    names = ("a", "b")
    made = FuseJob(
        directory=job,
        round_id="rnd-1",
        pivot_name="pivot-1",
        spec=SPEC,
        pivot_files={},
        contributions={name: job / "opened" / f"{name}.safetensors" for name in names},
        reports={},
        prompts=None,
        evals=None,
        sealed={"a": hub.sealed(b"numbers"), "b": hub.root / "older"},
        worker_folder=hub.folder,
    )
    made.save()
    loaded = FuseJob.load(job)
    for _ in range(2):  # a killed worker's leavings are in nobody's way
        open_contributions(loaded)
        found = [loaded.contributions[name].read_bytes() for name in names]
        assert found == [b"numbers", b"of a release that did not seal"]
    assert (job / "opened").stat().st_mode & 0o777 == 0o700


def test_the_opener_removes_what_it_opened_whatever_it_finds(hub: Hub) -> None:
    scratch = hub.folder / SCRATCH
    scratch.mkdir()
    (hub.root / "prompts").write_text('{"text": "a"}\n')
    asked = {
        "id": 7,
        "path": str(hub.sealed(b"no logits")),
        "round_id": "rnd-1",
        "participant": "a",
        "spec": SPEC.model_dump_json(),
        "pivot_sha256": "0" * 64,
        "weights": str(hub.root / "weights"),
        "public_set": str(hub.root / "prompts"),
    }
    worker = Worker.at(hub.folder)
    assert "refused" in answer(worker, asked)
    assert answer(worker, {**asked, "round_id": "rnd-2"})["refused"].startswith("sealed: ")
    gone = answer(worker, {**asked, "path": str(hub.root / "gone")})
    assert gone["error_id"] == "store_unavailable"
    assert not list(scratch.iterdir())


def test_a_hub_whose_key_others_may_read_does_not_start(hub: Hub) -> None:
    hub.public.unlink()
    (hub.folder / "key.pem").chmod(0o644)
    opening = Opening(hub.folder, hub.public, hub.root / "artifacts")
    with pytest.raises(OpenerError, match="chmod 600"):
        opening.start()
    opening.stop()


def test_what_was_on_its_way_when_the_key_was_rotated_still_opens(hub: Hub) -> None:
    before = hub.sealed(b"old", "a")
    old, new = rotate_worker_key(hub.folder, hub.public)
    assert old == hub.kid != new
    after = hub.sealed(b"new", "b")
    assert (hub.open(before, "a"), hub.open(after, "b")) == (b"old", b"new")
    assert (hub.folder / RETIRED).stat().st_mode & 0o777 == 0o700
    assert (hub.folder / RETIRED / f"{old}.pem").stat().st_mode & 0o777 == 0o600
    assert forget_retired_keys(hub.folder) == [old]
    with pytest.raises(SealError, match=f"sealed to key {old[:16]}, wanted {new[:16]}"):
        hub.open(before, "a")
    assert hub.open(after, "b") == b"new"


def test_a_rotation_that_was_cut_short_is_repeated(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the new key has its place: the old one is today's, and no key is lost."""
    path = hub.sealed(b"x")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            rotate_worker_key(hub.folder, hub.public)
    assert hub.open(path) == b"x"
    old, _ = rotate_worker_key(hub.folder, hub.public)
    assert (old, hub.open(path)) == (hub.kid, b"x")
