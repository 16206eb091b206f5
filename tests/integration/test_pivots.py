"""Pivots over the wire: signed where they are kept, and checked wherever they arrive."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cofuse.cli import app
from cofuse.sdk import Coordinator
from coordinator.artifacts import open_artifacts
from coordinator.store import Store
from coordinator.wiring import serving
from fusion.models import ModelSpec, build_model, save_model, train_tokenizer
from participant.client import Client
from participant.config import ParticipantConfig
from participant.pivots import fetch_pivot
from protos.chunks import sha256_of
from protos.config import TlsConfig
from protos.errors import RemoteError
from protos.messages import Assignment, FileRef
from protos.spec import RoundSpec
from protos.tls import TlsFiles
from tests.cofuse.envelope import told
from tests.integration.conftest import MakeIdentity, config_at, identities_at
from trust.keys import kid, load_public, new_key
from trust.pivot_manifest import MANIFEST_FILE, SIGNER_FILE, ManifestError
from trust.pivots_seen import PIVOTS_SEEN


class Hub:
    """A coordinator with one imported pivot and its rollback-able child, on real mutual TLS."""

    def __init__(self, root: Path, identities: MakeIdentity, address: str, store: Store) -> None:
        self.root, self.identities, self.address, self.store = root, identities, address, store

    def sdk(self, role: Any, name: str) -> Coordinator:
        files = self.identities(role, name)
        return Coordinator(self.address, ca=files.ca, certificate=files.certificate, key=files.key)

    def cli(self, role: Any, *words: str) -> Result:
        """`cofuse pivot ...` under an identity's folder, as it is typed."""
        files: TlsFiles = self.identities(role, "typed")
        home = files.key.parent
        for public in ("ca.pem", SIGNER_FILE):
            (home / public).write_bytes(files.ca.with_name(public).read_bytes())
        where = ["--at", self.address, "--identity", str(home)]
        return CliRunner().invoke(app, ["pivot", *words, *where])


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("pivots")
    identities = identities_at(root)
    tokenizer = train_tokenizer(["A stenosis."], 300)
    spec = ModelSpec(
        architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=len(tokenizer)
    )
    save_model(build_model(spec, 0), tokenizer, root / "model")
    config = config_at(root, identities)
    _older_release(config.data_dir, root / "model")
    with serving(config) as running:
        hub = Hub(root, identities, running.address, running.store)
        with hub.sdk("operator", "grace") as operator:
            operator.import_pivot("pivot-0", root / "model")
            operator.import_pivot("pivot-0", root / "model")  # again: nothing changes
        yield hub


def _older_release(data_dir: Path, model: Path) -> None:
    """Leave two pivots, pivot-7 made from pivot-6, that nobody has signed."""
    data_dir.mkdir()
    store, artifacts = Store.at(data_dir / "coordinator.sqlite"), open_artifacts(data_dir, None)
    files = []
    for path in sorted(model.iterdir()):
        reference = FileRef(name=path.name, sha256=sha256_of(path), size_bytes=path.stat().st_size)
        artifacts.add(path, reference.sha256)
        store.add_artifact(reference.sha256, "coordinator", "PIVOT", reference.size_bytes)
        files.append(reference)
    for name, parent in (("pivot-6", ""), ("pivot-7", "pivot-6")):
        store.add_pivot(name=name, parent=parent, round_id="", files=files, evals_json="{}")
    store.close()


def test_a_researcher_gets_what_was_signed_and_the_fingerprint_is_the_keys(
    hub: Hub, tmp_path: Path
) -> None:
    with hub.sdk("researcher", "ada") as researcher:
        folder = researcher.download_pivot("pivot-0", tmp_path / "pivot")
        manifest = researcher.manifest("pivot-0")
    assert {path.name for path in folder.iterdir()} == {
        MANIFEST_FILE,
        *(path.name for path in (hub.root / "model").iterdir()),
    }
    for path in (hub.root / "model").iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert manifest.signer == kid(load_public(hub.root / "ca" / SIGNER_FILE))
    assert (hub.root / "researcher-ada" / PIVOTS_SEEN).exists()


def assignment(hub: Hub, **changes: Any) -> Assignment:
    with hub.sdk("researcher", "ada") as researcher:
        files = researcher.pivot("pivot-0").files
    spec = {"name": "x", "pivot": "pivot-0", "participants": ["st-mary"], "kind": "weights"}
    values = {
        "round_id": "rnd-1",
        "attempt": 1,
        "submitted_by": "ada",
        "spec": RoundSpec.model_validate(
            {**spec, "method": "merge", "training": {"steps": 1, "lr": 0.001}}
        ),
        "pivot": files,
        "pivot_sha256": sha256_of(hub.root / "model" / "model.safetensors"),
        "deadline_unix_ms": 1,
    }
    return Assignment(**{**values, **changes})


@pytest.fixture
def site(hub: Hub, tmp_path: Path) -> Iterator[tuple[ParticipantConfig, Client]]:
    files = hub.identities("participant", "st-mary")
    config = ParticipantConfig.model_validate(
        {
            "name": "st-mary",
            "coordinator": hub.address,
            "corpus": tmp_path / "corpus.jsonl",
            "data_dir": tmp_path / "data",
            "policy": tmp_path / "policy.toml",
            "model": {
                **{"architecture": "llama", "hidden_size": 32, "layers": 1},
                **{"heads": 2, "vocab_size": 300},
            },
            "training": {"steps": 1},
            "tls": TlsConfig(ca=files.ca, certificate=files.certificate, key=files.key),
        }
    )
    client = Client(hub.address, files)
    client.join("test")
    yield config, client
    client.close()


def test_a_participant_takes_the_rounds_pivot_and_no_other(
    hub: Hub, site: tuple[ParticipantConfig, Client], tmp_path: Path
) -> None:
    config, client = site
    asked = assignment(hub)
    fetch_pivot(config, asked, client, tmp_path / "pivot")
    assert (tmp_path / "pivot" / "config.json").exists()
    assert (tmp_path / "data" / "pivots-seen.json").exists()
    fetch_pivot(config, asked, client, tmp_path / "pivot")  # a second try of the same round
    unsigned = tuple(file for file in asked.pivot if file.name != MANIFEST_FILE)
    extra = (*asked.pivot, asked.pivot[0].model_copy(update={"name": "x.json"}))
    for changes, says in (
        ({"pivot": unsigned}, "without a signed manifest"),
        ({"pivot": extra}, "not the files"),
        ({"pivot_sha256": "0" * 64}, "not those of pivot-0"),
        ({"spec": asked.spec.model_copy(update={"pivot": "pivot-9"})}, "asked for pivot-9"),
    ):
        with pytest.raises(ManifestError, match=says):
            fetch_pivot(config, assignment(hub, **changes), client, tmp_path / "pivot")
    assert (tmp_path / "pivot" / "config.json").exists()


def test_rollback_and_lineage_as_they_are_typed(hub: Hub, tmp_path: Path) -> None:
    with hub.sdk("operator", "grace") as operator:
        operator.import_pivot("pivot-4", hub.root / "model")
    back = hub.cli("operator", "rollback", "pivot-7", "--json")
    assert back.exit_code == 0, back.output
    made = told(back.stdout)["pivot"]
    assert made == "pivot-8"
    found = hub.cli("researcher", "lineage", made)
    lines = [line.strip(" `-") for line in found.stdout.splitlines()]
    assert [line.split()[0] for line in lines if line.startswith("pivot")] == [
        *("pivot-8", "pivot-7", "pivot-6")
    ]
    assert "rollback, the files of pivot-6 again" in lines[0]
    denied = hub.cli("researcher", "rollback", "pivot-4")
    assert denied.exit_code == 4
    assert "not_allowed" in denied.output
    alone = hub.cli("operator", "rollback", "pivot-4")
    assert alone.exit_code == 1
    assert "nothing to go back to" in alone.output
    found = hub.cli("researcher", "lineage", "pivot-4", "--json")
    assert found.exit_code == 0, found.output
    said = told(found.stdout)
    assert [row["name"] for row in said["lineage"]] == ["pivot-4"]
    assert "import" in found.stderr
    pulled = hub.cli("researcher", "pull", "pivot-4", "--out", str(tmp_path / "p"))
    assert pulled.exit_code == 0, pulled.output
    assert (tmp_path / "p" / MANIFEST_FILE).exists()


def test_pulling_an_older_version_must_be_meant(hub: Hub, tmp_path: Path) -> None:
    assert hub.cli("researcher", "pull", "pivot-7", "--out", str(tmp_path / "p")).exit_code == 0
    refused = hub.cli("researcher", "pull", "pivot-6", "--out", str(tmp_path / "p"))
    assert refused.exit_code == 1
    assert "older than pivot-7" in refused.output
    assert json.loads((tmp_path / "p" / "config.json").read_text())["model_type"] == "llama"
    words = ("pull", "pivot-6", "--older", "--out", str(tmp_path / "p"))
    assert hub.cli("researcher", *words).exit_code == 0


def test_with_another_signers_key_nothing_is_taken(hub: Hub, tmp_path: Path) -> None:
    home = tmp_path / "eve"
    files = hub.identities("researcher", "eve")
    home.mkdir()
    (home / "ca.pem").write_bytes(files.ca.read_bytes())
    with (
        Coordinator(
            hub.address, ca=home / "ca.pem", certificate=files.certificate, key=files.key
        ) as eve,
    ):
        with pytest.raises(RemoteError, match="no key to check pivots with") as caught:
            eve.download_pivot("pivot-0", tmp_path / "p")
        assert caught.value.error_id == "untrusted_pivot"
        new_key(tmp_path / "other.pem")
        (home / SIGNER_FILE).write_bytes((tmp_path / "other.pem").read_bytes())
        with pytest.raises(RemoteError, match="do not use it"):
            eve.download_pivot("pivot-0", tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_pivot_that_waits_is_for_operators_alone_until_two_have_promoted_it(
    hub: Hub, tmp_path: Path
) -> None:
    hub.store.promotions_needed = 2
    with hub.sdk("operator", "grace") as operator, hub.sdk("researcher", "ada") as researcher:
        made = operator.import_pivot("pivot-90", hub.root / "model")
        hub.store.promotions_needed = 0
        assert (made.waits_for, made.promoted_by) == (1, ("grace",))
        asked = {"name": "x", "pivot": "pivot-90", "participants": ["st-mary"], "kind": "weights"}
        spec = {**asked, "method": "merge", "training": {"steps": 1, "lr": 0.001}}
        with pytest.raises(RemoteError, match="pivot-90 waits for the yes of 1 more") as refused:
            researcher.submit(RoundSpec.model_validate(spec))
        assert refused.value.error_id == "not_promoted"
        with pytest.raises(RemoteError, match="pivot-90 waits"):
            researcher.download_pivot("pivot-90", tmp_path / "early")
        assert "waits for 1 more" in hub.cli("operator", "ls").stdout
        wrong = hub.cli("operator", "promote", "pivot-90", "--content", "00")
        assert (wrong.exit_code, "not promoted" in wrong.stderr) == (1, True)
        right = hub.cli("operator", "promote", "pivot-90", "--json")
        assert told(right.stdout)["promoted_by"] == ["grace", "typed"]
        assert researcher.download_pivot("pivot-90", tmp_path / "now").exists()
