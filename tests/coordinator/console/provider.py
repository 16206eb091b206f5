"""An OpenID Connect provider that really answers, on loopback; a test says whom it names."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256

CLIENT, SECRET = "cofuse", "of the client"


def b64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def number(value: int) -> str:
    return b64(value.to_bytes((value.bit_length() + 7) // 8))


@dataclass
class Provider:
    """Signs by RS256 with key "r", by ES256 with key "e"."""

    issuer: str = ""
    rsa_key: rsa.RSAPrivateKey = field(
        default_factory=lambda: rsa.generate_private_key(65537, 2048)
    )
    ec_key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )
    claims: dict[str, Any] = field(default_factory=dict)
    """What the next ID token says besides issuer, audience and nonce."""
    challenges: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Nonce and PKCE challenge, by code."""

    @property
    def keys(self) -> list[dict[str, str]]:
        public, point = self.rsa_key.public_key().public_numbers(), self.ec_key.public_key()
        x, y = point.public_numbers().x, point.public_numbers().y
        return [
            {"kid": "r", "kty": "RSA", "n": number(public.n), "e": number(public.e)},
            {"kid": "e", "kty": "EC", "crv": "P-256", "x": number(x), "y": number(y)},
        ]

    def token(self, claims: dict[str, Any], *, kid: str = "r", algorithm: str = "RS256") -> str:
        head = b64(json.dumps({"alg": algorithm, "kid": kid}).encode())
        text = f"{head}.{b64(json.dumps(claims).encode())}"
        if kid == "r":
            mark = self.rsa_key.sign(text.encode(), padding.PKCS1v15(), SHA256())
        else:
            halves = decode_dss_signature(self.ec_key.sign(text.encode(), ec.ECDSA(SHA256())))
            mark = b"".join(half.to_bytes(32) for half in halves)
        return f"{text}.{b64(mark)}"

    def grant(self, address: str) -> str:
        """What a person's yes at the authorization address sends back: code and state."""
        asked = {key: values[0] for key, values in parse_qs(urlsplit(address).query).items()}
        assert asked["code_challenge_method"] == "S256"
        code = f"code-{len(self.challenges)}"
        self.challenges[code] = (asked["nonce"], asked["code_challenge"])
        return f"/login/callback?code={code}&state={asked['state']}"

    def answer(self, path: str, form: dict[str, str], authorization: str) -> tuple[int, Any]:
        """One request."""
        if path.endswith("/openid-configuration"):
            names = ("authorization_endpoint", "token_endpoint", "jwks_uri")
            return 200, {"issuer": self.issuer, **{n: f"{self.issuer}/{n}" for n in names}}
        if path.endswith("/jwks_uri"):
            return 200, {"keys": self.keys}
        nonce, challenge = self.challenges.pop(form["code"], ("", ""))
        proof = b64(hashlib.sha256(form["code_verifier"].encode()).digest())
        basic = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        if proof != challenge or authorization != f"Basic {basic}":
            return 400, {"error": "invalid_grant"}
        usual = {"iss": self.issuer, "aud": CLIENT, "nonce": nonce}
        return 200, {"id_token": self.token(usual | self.claims)}


@contextmanager
def serving() -> Iterator[Provider]:
    """One that answers until the block ends."""
    provider = Provider()

    class Handler(BaseHTTPRequestHandler):
        def _say(self) -> None:
            length = int(self.headers.get("content-length", 0))
            form = {k: v[0] for k, v in parse_qs(self.rfile.read(length).decode()).items()}
            status, found = provider.answer(self.path, form, self.headers.get("authorization", ""))
            body = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = _say  # noqa: N815 - named by http.server

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    provider.issuer = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield provider
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
