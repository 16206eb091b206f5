"""coordinator.toml: passwords never go in the clear, and others are told where they can dial."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from coordinator.config import ConsoleConfig, CoordinatorConfig
from protos.config import ConfigError, TlsConfig
from trust.ca import create_authority, new_identity, sign_request


@pytest.mark.parametrize(
    ("listen", "hosts", "dialled"),
    [
        ("0.0.0.0:9443", ("fuse.example.org", "localhost"), "fuse.example.org:9443"),
        ("0.0.0.0:9443", ("localhost", "127.0.0.1", "10.0.0.7"), "10.0.0.7:9443"),
        ("[::]:9443", ("localhost", "2001:db8::7"), "[2001:db8::7]:9443"),
        ("127.0.0.1:9443", ("fuse.example.org", "127.0.0.1"), "127.0.0.1:9443"),
        ("127.0.0.1:9443", ("localhost",), "localhost:9443"),
    ],
)
def test_others_are_told_a_name_that_the_certificate_has(
    tmp_path: Path, listen: str, hosts: tuple[str, ...], dialled: str
) -> None:
    create_authority(tmp_path / "ca", "test")
    request = new_identity(tmp_path / "tls", "coordinator", "hub")
    pem = sign_request(tmp_path / "ca", request, role="coordinator", name="hub", hosts=hosts)
    (tmp_path / "hub.pem").write_bytes(pem)
    files = {name: tmp_path / "hub.pem" for name in ("ca", "certificate", "key")}
    config = CoordinatorConfig(data_dir=tmp_path, tls=TlsConfig(**files))
    assert config.reached_at(listen) == dialled
    (tmp_path / "hub.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"hub\.pem"):
        config.reached_at(listen)


def test_it_listens_on_loopback_or_with_tls() -> None:
    assert not ConsoleConfig(listen="127.0.0.1:8080").is_https
    behind = ConsoleConfig(listen="localhost:1", origin="https://fuse.example.org")
    assert behind.is_https
    assert behind.hosts == ("localhost", "fuse.example.org")
    assert ConsoleConfig.model_validate(
        {"listen": "0.0.0.0:443", "certificate": "c.pem", "key": "k.pem"}
    ).is_https


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"listen": "0.0.0.0:8080"}, "passwords are typed here"),
        ({"listen": "127.0.0.1.evil.example:80"}, "passwords are typed here"),
        ({"certificate": "c.pem"}, "wanted both or none"),
        ({"origin": "https://fuse.example.org/path"}, "pattern"),
        ({"port": 8080}, "Extra inputs"),
    ],
)
def test_what_would_be_unsafe_is_refused(given: dict[str, str], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ConsoleConfig.model_validate(given)
