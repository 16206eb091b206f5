"""Signing in by a provider: whom it names, nobody else, and each answer once."""

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from coordinator.config import ConsoleConfig, OidcConfig
from coordinator.console import oidc
from coordinator.console.app import build
from coordinator.console.news import News
from coordinator.console.users import UserError
from tests.coordinator.console.conftest import PASSWORD, World
from tests.coordinator.console.provider import CLIENT, SECRET, Provider, serving

WHO = "ada@example.org"


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    with serving() as found:
        yield found


@pytest.fixture
def site(world: World, provider: Provider, tmp_path: Path) -> World:
    """The console with a provider, where alone ada is known."""
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    sso = OidcConfig(
        issuer=provider.issuer,
        client_id=CLIENT,
        client_secret_file=tmp_path / "secret",
        claim="email",
    )
    config = world.desk.config.model_copy(update={"console": ConsoleConfig(oidc=sso)})
    world.desk.users.add("ada", "researcher", "", sso=WHO)
    desk = replace(world.desk, config=config)
    provider.claims = {"email": WHO, "email_verified": True, **times()}
    return replace(world, desk=desk, app=build(desk, News(world.store)))


def times(ends_s: float = 300, made_s: float = 0) -> dict[str, float]:
    return {"iat": time.time() + made_s, "exp": time.time() + ends_s}


def begun(client: TestClient, after: str = "/") -> str:
    """Where the provider is to be asked."""
    answer = client.get("/login/sso", params={"after": after})
    assert answer.status_code == 303, answer.text
    return answer.headers["location"]


def test_who_is_known_comes_in_where_they_wanted_to_go(site: World, provider: Provider) -> None:
    client = site.browser()
    host = urlsplit(provider.issuer).hostname
    assert f"Sign in with {host}" in client.get("/login").text
    back = client.get(provider.grant(begun(client, "/pivots")))
    assert (back.status_code, back.headers["location"]) == (303, "/pivots")
    assert re.search(r"ada\s*<span[^>]*>researcher", client.get("/pivots").text)
    site.desk.users.add("ada", "researcher", "", sso="ada@elsewhere.org")
    assert client.get("/pivots").status_code == 303, "another name at the provider ends sessions"


def test_an_answer_counts_once_and_in_the_browser_that_asked(
    site: World, provider: Provider
) -> None:
    client, other = site.browser(), site.browser()
    answer = provider.grant(begun(client))
    begun(other)
    assert other.get(answer).status_code == 403
    assert site.browser().get(answer).status_code == 403
    assert client.get(answer.replace("state=", "state=x")).status_code == 403
    assert client.get(answer).status_code == 303
    assert client.get(answer).status_code == 403


@pytest.mark.parametrize(
    "claims",
    [
        {"email": "bob@example.org"},
        {"email": None},
        {"email_verified": False},
        {"exp": 1.0},
        {"iat": 9e12},
        {"exp": None},
        {"nonce": "another"},
        {"aud": "another"},
        {"aud": [CLIENT], "azp": "another"},
        {"iss": "https://evil.example"},
    ],
)
def test_whom_the_provider_does_not_vouch_for_stays_outside(
    site: World, provider: Provider, claims: dict[str, Any]
) -> None:
    client = site.browser()
    provider.claims |= claims
    refused = client.get(provider.grant(begun(client)))
    assert refused.status_code == 403
    assert 'role="alert"' in refused.text
    assert client.get("/").status_code == 303


def test_a_token_counts_only_as_its_key_has_signed_it(provider: Provider) -> None:
    where = oidc.Provider(provider.issuer, "", "", "")
    claims = {"iss": provider.issuer, "aud": CLIENT, "sub": "a"}
    for kid, algorithm in (("r", "RS256"), ("e", "ES256")):
        good = provider.token(claims, kid=kid, algorithm=algorithm)
        assert oidc.claims_of(good, provider.keys, where, CLIENT) == claims
        head, body, mark = good.split(".")
        changed = provider.token(claims | {"sub": "b"}, kid=kid, algorithm=algorithm).split(".")[1]
        odd = [f"{head}.{changed}.{mark}", f"{head}.{body}.", "a.b", "", f"{head}.{body}.{mark}x!"]
        odd += [provider.token(claims, kid=kid, algorithm=a) for a in ("none", "HS256", "RS512")]
        for bad in odd:
            with pytest.raises(oidc.OidcError):
                oidc.claims_of(bad, provider.keys, where, CLIENT)
        with pytest.raises(oidc.OidcError, match="none of the provider's keys"):
            oidc.claims_of(good, [], where, CLIENT)


def test_a_provider_that_is_not_there_or_not_itself_is_told(
    site: World, provider: Provider
) -> None:
    assert "OidcError" not in site.browser().get("/login").text
    issuer, provider.issuer = provider.issuer, "https://evil.example"
    try:
        refused = site.browser().get("/login/sso")
    finally:
        provider.issuer = issuer
    assert refused.status_code == 502
    assert "Signing in did not work" in refused.text
    with pytest.raises(oidc.OidcError, match="wanted https"):
        oidc.fetch("http://login.example.org/keys")


def test_who_signs_in_there_has_no_password_here(site: World) -> None:
    for password in ("", "none", "nobody's", PASSWORD):
        data = {"name": "ada", "password": password}
        assert site.browser().post("/login", data=data).status_code in (403, 422)
    with pytest.raises(UserError, match="one person each"):
        site.desk.users.add("bob", "researcher", PASSWORD, sso=WHO)


def test_a_revoked_name_does_not_come_in_by_the_provider(site: World, provider: Provider) -> None:
    user = site.desk.users.get("ada")
    assert user is not None
    site.desk.revocations.revoke_all_of(user.identity, "left")
    site.desk.members.refresh()
    client = site.browser()
    assert client.get(provider.grant(begun(client))).status_code == 403


@pytest.mark.parametrize("issuer", ["http://login.example.org", "login.example.org", "https://x?y"])
def test_only_an_issuer_over_https_or_on_this_machine(issuer: str) -> None:
    with pytest.raises(ValueError, match="issuer"):
        OidcConfig(issuer=issuer, client_id="cofuse")
