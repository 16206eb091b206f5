"""What the engine's public port takes, from whom and how much; Flower itself is not needed."""

import asyncio
import base64
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator import gate
from coordinator.gate import MAX_BODY_BYTES, Gate, PortTls, PublicPort
from coordinator.limits import Rates
from tests.integration import certificates
from trust import ca
from trust.identity import Leaf

SHORT_S = 0.5


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the body that was let through."""
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@dataclass
class Port:
    root: Path
    address: str
    rates: Rates
    revoked: set[str]

    def tls(self, name: str) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=str(self.root / "ca" / "ca.pem"))
        context.load_cert_chain(self.root / name / "cert.pem", self.root / name / "key.pem")
        return context

    def headers(self, name: str) -> dict[str, str]:
        key = ca.public_key_bytes((self.root / name / "cert.pem").read_bytes())
        return {"the-key": base64.b64encode(key).decode()}

    def post(self, name: str, path: str = "/in", **how: Any) -> int:
        how = {"headers": self.headers(name), **how}
        url = f"https://{self.address}"
        with httpx.Client(base_url=url, verify=self.tls(name), trust_env=False) as client:
            return client.post(path, **how).status_code

    def connect(self) -> socket.socket:
        host, port = self.address.split(":")
        return socket.create_connection((host, int(port)), timeout=20 * SHORT_S)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Port]:
    root = tmp_path_factory.mktemp("gate")
    ca.create_authority(root / "ca", "x")
    for role, name in (("coordinator", "hub"), ("participant", "a"), ("researcher", "r")):
        request = ca.new_identity(root / name, role, name)  # type: ignore[arg-type]
        pem = ca.sign_request(root / "ca", request, role=role, name=name)  # type: ignore[arg-type]
        (root / name / "cert.pem").write_bytes(pem)
    tls = PortTls(
        ca=root / "ca" / "ca.pem",
        certificate=root / "hub" / "cert.pem",
        key=root / "hub" / "key.pem",
    )
    routes = {"/in": lambda body: b"forged" not in body}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "HANDSHAKE_S", SHORT_S)
        patch.setattr(gate, "REQUEST_S", SHORT_S)
        rates = Rates(gate.CALLS_PER_S, gate.BURST)
        revoked = set[str]()
        guarded = Gate(
            application,
            key_header="The-Key",
            routes=routes,
            rates=rates,
            refusal=lambda leaf: leaf.identity.name in revoked,
        )
        opened = PublicPort(guarded, tls)
        listener = socket.create_server(("127.0.0.1", 0))
        opened.open(listener)
        yield Port(root, f"127.0.0.1:{listener.getsockname()[1]}", rates, revoked)
        opened.close()


def test_a_participant_that_behaves_is_let_through(port: Port) -> None:
    assert port.post("a", content=b"x" * MAX_BODY_BYTES) == 200


@pytest.mark.parametrize(
    ("name", "how", "status"),
    [
        ("a", {"path": "/elsewhere"}, 404),
        ("a", {"headers": {}}, 403),
        ("a", {"headers": {"the-key": "eA=="}}, 403),
        ("r", {}, 403),
        ("a", {"content": b"forged"}, 403),
        ("a", {"content": b"x" * (MAX_BODY_BYTES + 1)}, 413),
    ],
)
def test_who_and_what_is_refused(port: Port, name: str, how: dict[str, Any], status: int) -> None:
    assert port.post(name, **how) == status


@pytest.mark.parametrize("state", ["expired", "for_servers", "by_a_member", "foreign"])
def test_a_certificate_that_is_not_a_members_gets_no_connection(
    port: Port, state: str, tmp_path: Path
) -> None:
    make: Any = getattr(certificates, state)
    how = {"other": "x"} if state == "foreign" else {}
    files = make(port.root / "ca", tmp_path / "home", "participant", "a", **how)
    context = ssl.create_default_context(cafile=str(files.ca))
    context.load_cert_chain(files.certificate, files.key)
    url = f"https://{port.address}"
    with (
        httpx.Client(base_url=url, verify=context, trust_env=False) as client,
        pytest.raises(httpx.TransportError),
    ):
        client.post("/in", headers=port.headers("a"))


def test_a_certificate_is_looked_at_for_every_request_of_a_connection(port: Port) -> None:
    """It may have been revoked since the connection began; then it is hung up on."""
    url = f"https://{port.address}"
    with httpx.Client(base_url=url, verify=port.tls("a"), trust_env=False) as client:
        answers = [client.post("/in", headers=port.headers("a"))]
        port.revoked.add("a")
        answers.append(client.post("/in", headers=port.headers("a")))
        port.revoked.clear()
    assert [answer.status_code for answer in answers] == [200, 403]
    assert answers[1].headers["connection"] == "close"


def test_a_body_that_hides_its_length_is_counted(port: Port) -> None:
    pieces = (b"x" * 65_536 for _ in range(MAX_BODY_BYTES // 65_536 + 1))
    assert port.post("a", content=pieces) == 413


def test_a_body_that_does_not_come_is_not_waited_for(port: Port) -> None:
    head = f"POST /in HTTP/1.1\r\nhost: x\r\nthe-key: {port.headers('a')['the-key']}\r\n"
    with (
        port.connect() as plain,
        port.tls("a").wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        secured.sendall(f"{head}content-length: 1000\r\n\r\nx".encode())
        assert secured.recv(100).startswith(b"HTTP/1.1 408 ")


def test_who_calls_too_often_is_told_so_and_others_are_not(port: Port) -> None:
    port.rates._buckets.clear()
    port.rates._per_s, port.rates._burst = 0.0, 3.0
    assert [port.post("a") for _ in range(4)] == [200, 200, 200, 429]
    port.rates._per_s = 1e6
    assert port.post("a") == 200


def test_a_connection_that_says_nothing_is_closed(port: Port) -> None:
    """Before the handshake, and after it."""
    with (
        port.connect() as mute,
        port.connect() as plain,
        port.tls("a").wrap_socket(plain, server_hostname="127.0.0.1") as secured,
    ):
        with suppress(ssl.SSLError, ConnectionError):
            assert secured.recv(1) == b""
        with suppress(ConnectionError):
            assert mute.recv(1) == b""


def test_no_more_calls_reach_flower_at_once_than_it_can_take() -> None:
    inside, most = 0, 0

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        await asyncio.sleep(0)
        inside -= 1
        await application(scope, receive, send)

    async def call(guarded: Gate) -> int:
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/in",
            "state": {
                "peer": gate._Peer(Leaf(ca.Identity("participant", "a"), 1, 0.0, 0.0, True), b"k")
            },
            "headers": [(b"the-key", base64.b64encode(b"k"))],
        }
        answers: list[Any] = []

        async def receive() -> Any:
            return {"type": "http.request", "body": b"x"}

        async def send(event: Any) -> None:
            answers.append(event)

        await guarded(scope, receive, send)
        return int(answers[0]["status"])

    async def together() -> list[int]:
        guarded = Gate(slow, key_header="the-key", routes={"/in": lambda _body: True})
        return await asyncio.gather(*(call(guarded) for _ in range(20)))

    assert asyncio.run(together()) == [200] * 20
    assert most == gate.AT_ONCE
