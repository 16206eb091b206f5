"""A token says who is invited and by whom, and only its own text is one."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trust.identity import Identity, IdentityError
from trust.tokens import new_token, parse_token, secret_sha256

ANNA = Identity("participant", "st-anna")
TOKEN = new_token(ANNA, "ab" * 32)
NAMES = st.from_regex(r"[a-z0-9-]{1,40}", fullmatch=True)


@given(st.sampled_from(["participant", "researcher", "operator"]), NAMES)
@settings(max_examples=30, deadline=None)
def test_a_token_comes_back_as_it_was(role: str, name: str) -> None:
    token = new_token(Identity(role, name), "ab" * 32)  # type: ignore[arg-type]
    assert parse_token(f" {token}\n") == token
    assert len(str(token)) < 220


def test_no_two_tokens_share_a_number_or_a_secret() -> None:
    tokens = [new_token(ANNA, "ab" * 32) for _ in range(500)]
    assert len({t.invitation for t in tokens}) == len({t.secret for t in tokens}) == 500


@given(st.text(max_size=120) | st.integers(0, len(str(TOKEN)) - 1).map(lambda n: str(TOKEN)[:n]))
@settings(max_examples=50, deadline=None)
def test_any_other_text_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(IdentityError, match="no join token") as caught:
        parse_token(text)
    assert TOKEN.secret not in str(caught.value)


def test_a_token_of_no_role_is_refused() -> None:
    with pytest.raises(IdentityError, match="wanted one of"):
        parse_token(str(TOKEN).replace("participant", "root"))


def test_what_is_shown_or_kept_of_a_token_does_not_hold_its_secret() -> None:
    assert TOKEN.secret not in repr(TOKEN)
    assert re.fullmatch(r"[0-9a-f]{64}", secret_sha256(TOKEN.secret))
