"""A participant that cannot seal is told so at its start, with what to do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from coordinator.sealed import ensure_worker_key
from participant.sealer import unsealable
from trust.seal_keys import RECIPIENT_FILE


def test_a_missing_key_is_named_and_one_that_is_there_is_not(tmp_path: Path) -> None:
    config: Any = SimpleNamespace(tls=SimpleNamespace(ca=tmp_path / "ca.pem"))
    assert RECIPIENT_FILE in unsealable(config)
    assert "from the operator" in unsealable(config)
    ensure_worker_key(tmp_path / "worker", tmp_path / RECIPIENT_FILE)
    assert unsealable(config) == ""
