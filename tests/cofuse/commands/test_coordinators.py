"""`cofuse coordinator init`: all of it, or nothing."""

from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from cofuse.cli import app


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["coordinator", *map(str, arguments)])
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--host", "two words", "found the host 'two words'"),
        ("--listen", "0.0.0.0", "wanted host:port"),
        ("--engine-listen", "0.0.0.0:70000", "wanted host:port"),
        ("--ops-listen", "0.0.0.0:7442", "wanted 127.0.0.1:port"),
    ],
)
def test_init_makes_nothing_before_all_is_right(
    tmp_path: Path, option: str, value: str, says: str
) -> None:
    code, said = run("init", tmp_path / "hub", option, value)
    assert code == 2
    assert says in said
    assert not (tmp_path / "hub").exists()


def test_a_host_may_be_an_address_or_a_name_of_any_script(tmp_path: Path) -> None:
    hosts = ("münchen.example", "fuse_1", "10.0.0.7", "::1")
    code, said = run("init", tmp_path, *(word for host in hosts for word in ("--host", host)))
    assert code == 0, said
    certificate = x509.load_pem_x509_certificate((tmp_path / "tls/certificate.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["xn--mnchen-3ya.example", "fuse_1"]
    assert [str(a) for a in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.7", "::1"]


def test_a_second_init_keeps_the_first_key(tmp_path: Path) -> None:
    assert run("init", tmp_path)[0] == 0
    key = (tmp_path / "ca" / "ca.key").read_bytes()
    code, said = run("init", tmp_path)
    assert code == 2
    assert "has an authority already" in said
    assert (tmp_path / "ca" / "ca.key").read_bytes() == key
