"""A receipt is kept when the hub signed all that it says, and else the round has none."""

from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from participant.config import ModelConfig, ParticipantConfig, TrainingConfig
from participant.receipts import keep
from protos.config import TlsConfig
from protos.v1 import fleet_pb2 as pb
from trust.keys import save_public
from trust.pivot_manifest import SIGNER_FILE
from trust.statements import Receipt, StatementError, sign, verify

HUB, OTHER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
SAYS: dict[str, Any] = {
    "sha256": "a" * 64,
    "round_id": "rnd-1",
    "participant": "st-mary",
    "size_bytes": 5,
    "committed_unix_ms": 7,
}


@pytest.fixture
def config(tmp_path: Path) -> ParticipantConfig:
    save_public(HUB.public_key(), tmp_path / SIGNER_FILE)
    (tmp_path / "data").mkdir()
    return ParticipantConfig(
        name="st-mary",
        coordinator="localhost:1",
        corpus=tmp_path,
        data_dir=tmp_path / "data",
        policy=tmp_path,
        model=ModelConfig(architecture="llama", hidden_size=32, layers=1, heads=2, vocab_size=300),
        training=TrainingConfig(steps=1),
        tls=TlsConfig(ca=tmp_path / "ca.pem", certificate=Path(), key=Path()),
    )


def test_a_signed_receipt_is_kept_as_it_was_signed(config: ParticipantConfig) -> None:
    signed = sign(Receipt(**SAYS), HUB)
    path = keep(config, pb.Receipt(**SAYS, signed_json=signed))
    assert path == config.data_dir / "receipts" / "rnd-1.dsse.json"
    assert verify(Receipt, path.read_text(), HUB.public_key()) == Receipt(**SAYS)


@pytest.mark.parametrize(
    "signed",
    [
        "",
        sign(Receipt(**SAYS), OTHER),
        sign(Receipt(**{**SAYS, "sha256": "b" * 64}), HUB),
        sign(Receipt(**{**SAYS, "participant": "mercy"}), HUB),
    ],
    ids=["unsigned", "another hub", "other bytes", "another's"],
)
def test_a_receipt_that_the_hub_did_not_sign_is_none(
    config: ParticipantConfig, signed: str
) -> None:
    with pytest.raises(StatementError):
        keep(config, pb.Receipt(**SAYS, signed_json=signed))
    assert not (config.data_dir / "receipts").exists()


def test_without_the_hubs_key_no_receipt_is_believed(config: ParticipantConfig) -> None:
    config.tls.ca.with_name(SIGNER_FILE).write_text("no key")
    with pytest.raises(StatementError, match="no key to check receipts"):
        keep(config, pb.Receipt(**SAYS, signed_json=sign(Receipt(**SAYS), HUB)))
