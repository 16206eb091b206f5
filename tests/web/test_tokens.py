"""Sessions and form tokens: ours, of this session, and not for ever."""

import time
from pathlib import Path

import time_machine

from web.tokens import HOURS, Sessions, secret_at


def test_a_cookie_is_read_back_and_no_other_text_is() -> None:
    sessions = Sessions(b"k" * 32)
    cookie = sessions.begin("ada", "stamp")
    session = sessions.read(cookie)
    assert session is not None
    assert (session.name, session.stamp) == ("ada", "stamp")
    assert Sessions(b"other" * 8).read(cookie) is None
    assert sessions.read(sessions.form_token(session)) is None  # another kind of token
    for broken in ("", cookie[:-1], cookie + "x", "a.b.c"):
        assert sessions.read(broken) is None


def test_a_form_token_fits_its_session_alone() -> None:
    sessions = Sessions(b"k" * 32)
    one, other = (sessions.read(sessions.begin("ada", "s")) for _ in range(2))
    assert one is not None
    assert other is not None
    token = sessions.form_token(one)
    assert sessions.is_own_form(one, token)
    assert not sessions.is_own_form(other, token)
    assert not sessions.is_own_form(one, "")


def test_both_end_after_their_hours() -> None:
    sessions = Sessions(b"k" * 32)
    cookie = sessions.begin("ada", "s")
    session = sessions.read(cookie)
    assert session is not None
    token = sessions.form_token(session)
    with time_machine.travel(time.time() + HOURS * 3600 + 5):
        assert sessions.read(cookie) is None
        assert not sessions.is_own_form(session, token)


def test_the_secret_is_made_once_and_for_nobody_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "session.key"
    secret = secret_at(path)
    assert len(secret) == 32
    assert secret_at(path) == secret
    assert path.stat().st_mode & 0o777 == 0o600
