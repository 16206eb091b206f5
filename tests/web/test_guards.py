"""Who is answered at all, before any page is asked."""

import pytest
from starlette.testclient import TestClient

from web.guards import HEADERS, MAX_BODY_BYTES, Guard, refused

HOSTS = {"localhost", "127.0.0.1", "fuse.example.org"}
OWN = {b"host": b"127.0.0.1:8080"}
FORM = {**OWN, b"origin": b"http://127.0.0.1:8080", b"content-length": b"10"}


@pytest.mark.parametrize(
    ("method", "headers", "status"),
    [
        ("GET", OWN, None),
        ("HEAD", {b"host": b"fuse.example.org"}, None),
        ("GET", {b"host": b"[::1]:8080"}, 421),
        ("GET", {b"host": b"evil.example"}, 421),
        ("GET", {b"host": b"127.0.0.1.evil.example:8080"}, 421),
        ("GET", {b"host": b"evil.example@127.0.0.1"}, 421),
        ("GET", {}, 421),
        ("POST", FORM, None),
        ("POST", {**FORM, b"origin": b"http://127.0.0.1:9"}, 403),
        ("POST", {**FORM, b"origin": b"https://evil.example"}, 403),
        ("POST", {**FORM, b"origin": b"null"}, 403),
        ("POST", OWN, 403),
        ("POST", {**FORM, b"content-length": str(MAX_BODY_BYTES + 1).encode()}, 413),
        ("POST", {**FORM, b"content-length": b"-1"}, 413),
        ("POST", {k: v for k, v in FORM.items() if k != b"content-length"}, 413),
        ("DELETE", OWN, 405),
    ],
)
def test_only_known_hosts_and_own_small_forms_are_answered(
    method: str, headers: dict[bytes, bytes], status: int | None
) -> None:
    found = refused(method, headers, HOSTS)
    assert (found[0] if found else None) == status


def test_a_body_longer_than_it_says_is_cut_off() -> None:
    heard: list[str] = []

    async def app(scope: object, receive: object, send: object) -> None:
        while (message := await receive())["type"] == "http.request":  # type: ignore[operator]
            if not message.get("more_body"):
                break
        heard.append(message["type"])

    async def drive() -> None:
        scope = {
            "type": "http",
            "method": "POST",
            "headers": [
                (b"host", b"localhost"),
                (b"origin", b"http://localhost"),
                (b"content-length", b"10"),
            ],
        }

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b"x" * 50_000, "more_body": True}

        async def send(_message: object) -> None: ...

        await Guard(app)(scope, receive, send)  # type: ignore[arg-type]

    import asyncio

    asyncio.run(drive())
    assert heard == ["http.disconnect"]


def test_every_answer_carries_the_headers_and_the_policy_allows_nothing_inline() -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})  # type: ignore[operator]
        await send({"type": "http.response.body", "body": b""})  # type: ignore[operator]

    client = TestClient(Guard(app), base_url="http://127.0.0.1")  # type: ignore[arg-type]
    for answer in (client.get("/"), client.delete("/"), client.get("/", headers={"host": "x"})):
        for name, value in HEADERS:
            assert answer.headers[name.decode()] == value.decode()
        assert answer.headers["cache-control"] == "no-store"
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
