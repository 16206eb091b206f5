"""`cofuse coordinator init`: all of it, or nothing."""

from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from cofuse.cli import app
from trust.ca import hosts_of, public_key_bytes


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


def test_the_server_gets_a_new_certificate_for_its_names_or_for_others(tmp_path: Path) -> None:
    run("init", tmp_path, "--host", "fuse.example.org", "--host", "10.0.0.7")
    first = (tmp_path / "tls" / "certificate.pem").read_bytes()
    assert run("certify", tmp_path, "--days", 30)[0] == 0
    second = (tmp_path / "tls" / "certificate.pem").read_bytes()
    assert second != first
    assert hosts_of(second) == hosts_of(first) == ("fuse.example.org", "10.0.0.7")
    assert run("certify", tmp_path, "--host", "hub.example")[0] == 0
    third = (tmp_path / "tls" / "certificate.pem").read_bytes()
    assert hosts_of(third) == ("hub.example",)
    assert public_key_bytes(third) == public_key_bytes(first)
    code, said = run("certify", tmp_path, "--host", "two words")
    assert code == 2
    assert "found the host 'two words'" in said
    assert (tmp_path / "tls" / "certificate.pem").read_bytes() == third


def test_a_second_init_keeps_the_first_key(tmp_path: Path) -> None:
    assert run("init", tmp_path)[0] == 0
    key = (tmp_path / "ca" / "ca.key").read_bytes()
    code, said = run("init", tmp_path)
    assert code == 2
    assert "has an authority already" in said
    assert (tmp_path / "ca" / "ca.key").read_bytes() == key
