"""A pivot that is not wholly what its signer vouches for gets to no parser, nor to its place."""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from safetensors.numpy import save_file

from trust import pivot_folder
from trust.keys import kid, save_public
from trust.pivot_folder import Trust, receive
from trust.pivot_manifest import (
    LIFETIME,
    MANIFEST_FILE,
    Manifest,
    ManifestError,
    Parent,
    PivotFile,
    seal_manifest,
    utc,
)

KEY, OTHER = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2))
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300}


@dataclass
class Shop:
    """Whoever offers pivots: what it signs, and what it sends."""

    root: Path
    sent: list[str] = field(default_factory=list)

    def make(self, name: str, **files: bytes) -> Path:
        """The files of a pivot."""
        folder = self.root / name
        folder.mkdir(parents=True)
        save_file(
            {"w": np.full(4, int(name[-1]), np.float32)},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        (folder / "config.json").write_text(json.dumps(CONFIG))
        for file, content in files.items():
            (folder / file.replace("__", ".")).write_bytes(content)
        return folder

    def sign(self, name: str, key: Ed25519PrivateKey = KEY, **changes: Any) -> Path:
        """Sign a pivot as it is; changes are lies of the signer."""
        folder = self.root / name
        now = datetime.now(UTC)
        first = Parent(name="pivot-0", content_sha256="0" * 64)
        values: dict[str, Any] = {
            "name": name,
            "root": "pivot-0",
            "parent": first if name[-1] > "0" else None,
            "files": tuple(
                PivotFile(name=o.name, sha256=o.sha256, size_bytes=o.size_bytes)
                for o in self.offer(name)
                if o.name != MANIFEST_FILE
            ),
            "created": utc(now),
            "round_id": "",
            "method": "import",
            "restores": "",
            "inputs": (),
            "evals": {},
            "issued": utc(now),
            "expires": utc(now + LIFETIME),
            "signer": kid(key.public_key()),
        }
        raw = seal_manifest(Manifest(**{**values, **changes}), key)
        (folder / MANIFEST_FILE).write_bytes(raw)
        return folder

    def offer(self, name: str) -> list["Offer"]:
        """What it says there is."""
        return [Offer(path) for path in sorted((self.root / name).iterdir())]

    def get(self, offer: "Offer", folder: Path) -> Path:
        """Send a file, its digest checked as protos/transfer.py does."""
        self.sent.append(offer.name)
        return Path(shutil.copyfile(offer.path, folder / offer.name))


@dataclass(frozen=True)
class Offer:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    shop = Shop(tmp_path / "shop")
    for name in ("pivot-0", "pivot-1", "pivot-2"):
        shop.make(name)
        shop.sign(name)
    return shop


@pytest.fixture
def trust(tmp_path: Path) -> Trust:
    save_public(KEY.public_key(), tmp_path / "pivot-signer.pem")
    return Trust(signer=tmp_path / "pivot-signer.pem", seen=tmp_path / "state" / "seen.json")


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_sound_pivot_comes_whole_and_replaces_the_one_before(
    shop: Shop, trust: Trust, tmp_path: Path
) -> None:
    place = tmp_path / "model"
    for name in ("pivot-0", "pivot-1", "pivot-1"):
        receive(name, shop.offer(name), shop.get, place, trust)
        assert content(place) == content(shop.root / name)
    assert shop.sent[0] == MANIFEST_FILE
    assert shop.sent.count("config.json") == 1  # what is the same is not sent again
    assert {path.name for path in tmp_path.iterdir()} == {
        *("shop", "pivot-signer.pem", "state", "model")
    }


def evil(shop: Shop, **files: bytes) -> None:
    """A pivot that the right key has signed, with other files in it."""
    shutil.rmtree(shop.root / "pivot-2")
    shop.make("pivot-2", **files)
    shop.sign("pivot-2")


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def bomb() -> bytes:
    header = json.dumps({"../../x": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"x"


Spoil = Callable[[Shop], object]
EXPIRED = utc(datetime.now(UTC) - timedelta(hours=1))
EARLY = utc(datetime.now(UTC) + timedelta(hours=1))
SPOILT: dict[str, tuple[Spoil, str]] = {
    "a byte of the weights": (
        lambda s: flip(s.root / "pivot-2" / "model.safetensors"),
        "not the files",
    ),
    "a byte of the manifest": (lambda s: flip(s.root / "pivot-2" / MANIFEST_FILE), "believed"),
    "an extra file": (lambda s: (s.root / "pivot-2" / "x.json").write_text("{}"), "not the files"),
    "a missing file": (lambda s: (s.root / "pivot-2" / "config.json").unlink(), "not the files"),
    "no manifest": (
        lambda s: (s.root / "pivot-2" / MANIFEST_FILE).unlink(),
        "without a signed manifest",
    ),
    "another signer": (lambda s: s.sign("pivot-2", OTHER), "believed"),
    "expired": (lambda s: s.sign("pivot-2", expires=EXPIRED), "expired"),
    "from tomorrow": (lambda s: s.sign("pivot-2", issued=EARLY), "set the clock"),
    "another pivot's manifest": (
        lambda s: shutil.copy(s.root / "pivot-0" / MANIFEST_FILE, s.root / "pivot-2"),
        "asked for pivot-2",
    ),
    "code named in the config": (
        lambda s: evil(s, config__json=json.dumps({**CONFIG, "auto_map": {}}).encode()),
        "code never travels",
    ),
    "an unknown setting": (
        lambda s: evil(
            s, config__json=json.dumps({**CONFIG, "_attn_implementation_internal": "x"}).encode()
        ),
        "not among the settings",
    ),
    "code": (lambda s: evil(s, modeling__py=b"1"), "leave it out"),
    "a pickle": (lambda s: evil(s, pytorch_model__bin=b"1"), "leave it out"),
    "a path as a tensor's name": (
        lambda s: evil(s, model__safetensors=bomb()),
        "safetensors of the pivot",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_spoilt_pivot_is_refused_and_the_old_one_stays(
    what: str, shop: Shop, trust: Trust, tmp_path: Path
) -> None:
    place = tmp_path / "model"
    receive("pivot-1", shop.offer("pivot-1"), shop.get, place, trust)
    spoil, says = SPOILT[what]
    spoil(shop)
    before = content(place)
    with pytest.raises(ManifestError, match=says):
        receive("pivot-2", shop.offer("pivot-2"), shop.get, place, trust)
    assert content(place) == before
    shutil.rmtree(shop.root / "pivot-2")
    shop.make("pivot-2")
    shop.sign("pivot-2")
    receive("pivot-2", shop.offer("pivot-2"), shop.get, place, trust)  # nothing is stuck


def test_a_file_that_changes_after_it_was_offered_is_refused(
    shop: Shop, trust: Trust, tmp_path: Path
) -> None:
    """The transfer checks digests too; the folder is looked at all the same."""
    offered = shop.offer("pivot-1")

    def get(offer: Offer, folder: Path) -> None:
        copy = shop.get(offer, folder)
        if offer.name == "model.safetensors":
            flip(copy)

    with pytest.raises(ManifestError, match="not the file of the manifest"):
        receive("pivot-1", offered, get, tmp_path / "model", trust)
    assert not (tmp_path / "model").exists()


def test_nothing_is_parsed_before_every_digest_fits(
    shop: Shop, trust: Trust, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed: list[str] = []
    monkeypatch.setattr(pivot_folder, "read_header", lambda path: parsed.append(path.name))
    monkeypatch.setattr(
        pivot_folder, "check_small_json", lambda name, raw: parsed.append(f"{name} {len(raw)}")
    )

    def get(offer: Offer, folder: Path) -> None:
        copy = shop.get(offer, folder)
        if offer.name == "model.safetensors":
            flip(copy)

    with pytest.raises(ManifestError):
        receive("pivot-1", shop.offer("pivot-1"), get, tmp_path / "model", trust)
    assert parsed == []


def test_an_older_version_is_refused_unless_it_is_meant(
    shop: Shop, trust: Trust, tmp_path: Path
) -> None:
    receive("pivot-2", shop.offer("pivot-2"), shop.get, tmp_path / "a", trust)
    with pytest.raises(ManifestError, match="older than pivot-2"):
        receive("pivot-1", shop.offer("pivot-1"), shop.get, tmp_path / "b", trust)
    assert not (tmp_path / "b").exists()
    meant = Trust(signer=trust.signer, seen=trust.seen, older=True)
    receive("pivot-1", shop.offer("pivot-1"), shop.get, tmp_path / "b", meant)
    with pytest.raises(ManifestError, match="older than pivot-2"):  # not forgotten by that
        receive("pivot-0", shop.offer("pivot-0"), shop.get, tmp_path / "b", trust)


def test_two_pivots_of_one_name_are_refused_even_if_an_older_one_is_meant(
    shop: Shop, trust: Trust, tmp_path: Path
) -> None:
    meant = Trust(signer=trust.signer, seen=trust.seen, older=True)
    first = {"created": "2026-01-01T00:00:00Z"}
    shop.sign("pivot-1", **first)
    receive("pivot-1", shop.offer("pivot-1"), shop.get, tmp_path / "a", meant)
    shop.sign("pivot-1", **first, issued="2026-01-02T00:00:00Z")  # the same, issued again
    receive("pivot-1", shop.offer("pivot-1"), shop.get, tmp_path / "a", meant)
    shop.sign("pivot-1", **first, method="other")
    with pytest.raises(ManifestError, match="two different pivots"):
        receive("pivot-1", shop.offer("pivot-1"), shop.get, tmp_path / "a", meant)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"lineages": 1}'])
def test_who_cannot_remember_takes_nothing(
    shop: Shop, trust: Trust, tmp_path: Path, damage: str
) -> None:
    trust.seen.parent.mkdir()
    trust.seen.write_text(damage)
    with pytest.raises(ManifestError, match="nobody knows"):
        receive("pivot-0", shop.offer("pivot-0"), shop.get, tmp_path / "a", trust)


def test_without_the_signers_key_nothing_is_taken(shop: Shop, trust: Trust, tmp_path: Path) -> None:
    for spoil in (lambda p: p.write_bytes(b"no key"), lambda p: p.unlink()):
        spoil(trust.signer)
        with pytest.raises(ManifestError, match="from the operator"):
            receive("pivot-0", shop.offer("pivot-0"), shop.get, tmp_path / "a", trust)


def test_a_folder_of_somebody_elses_files_is_left_alone(
    shop: Shop, trust: Trust, tmp_path: Path
) -> None:
    place = tmp_path / "home"
    place.mkdir()
    (place / "thesis.txt").write_text("mine")
    with pytest.raises(ManifestError, match=r"thesis\.txt"):
        receive("pivot-0", shop.offer("pivot-0"), shop.get, place, trust)
    (place / "thesis.txt").unlink()
    receive("pivot-0", shop.offer("pivot-0"), shop.get, place, trust)
    (place / "notes.txt").write_text("mine too")
    with pytest.raises(ManifestError, match=r"notes\.txt"):
        receive("pivot-1", shop.offer("pivot-1"), shop.get, place, trust)
    assert (place / "notes.txt").read_text() == "mine too"
