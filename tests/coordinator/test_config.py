"""[console]: passwords never go over a network in the clear."""

import pytest
from pydantic import ValidationError

from coordinator.config import ConsoleConfig


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
