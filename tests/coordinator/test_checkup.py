"""The walls around what opens contributions, tried for real."""

from pathlib import Path

import pytest

from coordinator.checkup import check
from coordinator.config import load_config
from coordinator.sealed import ensure_worker_key
from coordinator.walls import ROLES
from protos.config import toml_text
from trust.landlock import SCOPE_ABI, abi


@pytest.mark.skipif(abi() < SCOPE_ABI, reason="this kernel's Landlock is older than Linux 6.12")
def test_whoever_opens_contributions_reaches_nothing_else_and_a_key_among_them_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The authority's folder lies wrong: among the files that participants sent."""
    monkeypatch.chdir(tmp_path)  # Python looks for code there
    names = ("data/artifacts/ca/ca.key", "tls/key.pem", "tls/pivot-key.pem")
    for name in (*names, "data/coordinator.sqlite", "data/audit/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    ensure_worker_key(tmp_path / "tls" / "worker", tmp_path / "fusion-worker.pem")
    settings = {
        "data_dir": "data",
        "authority": "data/artifacts/ca",
        "tls": {"ca": "ca.pem", "certificate": "tls/certificate.pem", "key": "tls/key.pem"},
    }
    toml = tmp_path / "coordinator.toml"
    toml.write_text(toml_text(settings), encoding="utf-8")
    found = check(toml, load_config(toml))
    through = {(one.role, one.says) for one in found.findings if one.verdict != "held"}
    wrong = {("opener", "reads the authority's key")}
    udp = {(role, "reaches another program by UDP") for role in ROLES}
    no_namespace = any("namespace" in words for words in found.missing)
    assert through == (wrong | udp if no_namespace else wrong)
    assert len(found.findings) == 2 * 15, "nothing is left out for not being there"
