"""fsck says of a pivot what a receiver would: signed by ours, of these files, from this parent."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from coordinator.clock import now_unix_ms
from coordinator.fsck import fsck
from tests.coordinator.test_signing import Hub
from trust.keys import load_public, new_key
from trust.pivot_manifest import MANIFEST_FILE, SIGNER_FILE


@pytest.fixture
def hub(tmp_path: Path) -> Hub:
    hub = Hub(tmp_path)
    hub.unsigned("pivot-0")
    hub.published()
    hub.signer.renew()
    return hub


def said(hub: Hub, signer: str = SIGNER_FILE) -> list[str]:
    """What fsck finds wrong with manifests, and no more than without the signer's key."""
    judged = fsck(
        hub.store.database,
        hub.artifacts,
        now_unix_ms(),
        pivot_signer=load_public(hub.root / signer),
    )
    others = fsck(hub.store.database, hub.artifacts, now_unix_ms()).findings
    found = [finding for finding in judged.findings if finding not in others]
    assert {(f.invariant, bool(f.do)) for f in found} <= {("I3", True)}
    return [finding.says for finding in found]


def change(hub: Hub, name: str, edit: Callable[[list[dict[str, object]]], object]) -> None:
    files = [file.model_dump() for file in hub.store.pivot(name).files]
    edit(files)
    with hub.store.database.write() as db:
        row = {"files": json.dumps(files), "name": name}
        db.execute(text("UPDATE pivots SET files_json = :files WHERE name = :name"), row)


def test_signed_pivots_are_as_they_should_be(hub: Hub) -> None:
    assert said(hub) == []


def test_a_pivot_of_an_older_release_is_signed_at_the_next_start(hub: Hub) -> None:
    change(hub, "pivot-1", lambda files: files.pop())
    assert said(hub) == []


def test_another_key_s_signature_counts_as_none(hub: Hub) -> None:
    new_key(hub.root / "other.pem")
    assert [one.partition(":")[0] for one in said(hub, "other.pub")] == ["pivot-0", "pivot-1"]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda files: files[-1].update(sha256="0" * 64), "pivot-1: its manifest is lost"),
        (lambda files: files.pop(0), "model.safetensors: not the files that its manifest lists"),
        (lambda files: files[0].update(sha256="0" * 64), "not the files that its manifest lists"),
    ],
)
def test_files_that_are_not_the_manifest_s_are_named(
    hub: Hub, edit: Callable[[list[dict[str, object]]], object], says: str
) -> None:
    change(hub, "pivot-1", edit)
    assert any(says in one for one in said(hub))


def test_a_manifest_of_another_pivot_or_parent_is_named(hub: Hub) -> None:
    other = next(f for f in hub.store.pivot("pivot-0").files if f.name == MANIFEST_FILE)
    change(hub, "pivot-1", lambda files: files.__setitem__(-1, other.model_dump()))
    assert "pivot-1: its manifest is of pivot-0" in said(hub)


def test_a_parent_that_was_replaced_is_named(hub: Hub) -> None:
    hub.unsigned("pivot-9")  # other weights
    replaced = [file.model_dump() for file in hub.store.pivot("pivot-9").files]
    change(hub, "pivot-0", lambda files: files.__setitem__(slice(None), replaced))
    hub.signer.renew()  # whoever has the key may sign another pivot-0; its child tells
    assert said(hub) == ["pivot-1: its manifest names another pivot-0 than the one here"]
