"""What stands before every page: who may be asked under which name, and what a browser may do.

One ASGI layer, so that also an error page and a static file get it.
"""

import re
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, Final
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    )
)
"""Content-Security-Policy of every answer: nothing inline, nothing from elsewhere."""
HEADERS: Final = (
    (b"content-security-policy", POLICY.encode()),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
    (b"referrer-policy", b"same-origin"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
_SAFE: Final = frozenset({"GET", "HEAD"})
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1"})
_HOST: Final = re.compile(r"([A-Za-z0-9.-]+)(:[0-9]{1,5})?")
_LENGTH: Final = re.compile(rb"[0-9]{1,9}")
MAX_BODY_BYTES: Final = 64 * 1024
"""Of a request: forms have a few fields."""


class Guard:
    """Refuses other host names, forms from other pages and large bodies; adds HEADERS.

    Args: hosts: names, besides loopback's own, under which people reach the pages.
    """

    def __init__(self, app: App, *, hosts: Collection[str] = ()) -> None:
        self._app = app
        self._hosts = _LOOPBACK | set(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                added = [pair for pair in HEADERS if pair[0] not in given]
                if b"cache-control" not in given:
                    added.append((b"cache-control", b"no-store"))
                message["headers"] = [*message["headers"], *added]
            await send(message)

        refusal = refused(scope["method"], dict(scope["headers"]), self._hosts)
        if refusal is not None:
            await _answer(sending, *refusal)
            return
        await self._app(scope, _limited(receive), sending)


def refused(
    method: str, headers: dict[bytes, bytes], hosts: Collection[str]
) -> tuple[int, str] | None:
    """Why a request is not answered, with the status; None: it is. Pure."""
    host = headers.get(b"host", b"").decode("latin-1")
    named = _HOST.fullmatch(host)
    if named is None or named[1] not in hosts:
        # A page elsewhere may let a name of its own point here (DNS rebinding).
        return 421, f"found the host {host[:80]!r}, wanted one of {', '.join(sorted(hosts))}"
    if method in _SAFE:
        return None
    if method != "POST":
        return 405, f"found {method[:20]}, wanted GET or POST"
    # Browsers say where a form comes from; one that says nothing is too old, or no browser.
    origin = headers.get(b"origin", b"").decode("latin-1")
    if urlsplit(origin).netloc != host:
        return 403, "found a form of another page, wanted one of ours: open the page and try again"
    length = headers.get(b"content-length", b"")
    if not _LENGTH.fullmatch(length) or int(length) > MAX_BODY_BYTES:
        return 413, f"found no length or too long a form, wanted at most {MAX_BODY_BYTES} bytes"
    return None


def _limited(receive: Receive) -> Receive:
    """What is received, cut off by an error once it is more than a form's."""
    left = MAX_BODY_BYTES

    async def receiving() -> MutableMapping[str, Any]:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        return message if left >= 0 else {"type": "http.disconnect"}

    return receiving


async def _answer(send: Send, status: int, words: str) -> None:
    body = words.encode() + b"\n"
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
