"""The joining side: from a token to a certificate, trusting nothing but the token.

The first connection only fetches a certificate whose fingerprint the token names. The second one
accepts nobody but whom that certificate vouches for, and only there the secret is said.
"""

import ssl
from base64 import b64encode
from http.client import HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

import grpc

from participant.durable import write_durably
from protos.errors import CofuseError, remote_errors
from protos.tls import CLIENT_OPTIONS, reason
from protos.v1 import enroll_pb2 as pb
from protos.v1 import enroll_pb2_grpc
from trust.ca import CERTIFICATE, KEY, REQUEST, new_identity
from trust.identity import Identity, IdentityError, fingerprint
from trust.pivot_manifest import SIGNER_FILE
from trust.seal_keys import RECIPIENT_FILE
from trust.tokens import Token

_CALL_S: Final = 30.0
AUTHORITY: Final = "ca.pem"


def join(address: str, token: Token, folder: Path) -> None:
    """Make a key in `folder`, or take the one that is there, and have it certified.

    Repeating it after a failure, also a lost answer, is safe: the key and its request stay.
    Args: address: host:port of the enrolment port.
    Raises: IdentityError when the folder is another identity's or has a certificate already.
        CofuseError wrong_authority or unreachable. RemoteError when the invitation is refused.
    """
    request = _request(folder, token.identity)
    authority = fetch_authority(address, token.authority)
    with _channel(address, authority) as channel:
        message = pb.RedeemRequest(
            invitation=token.invitation, secret=token.secret, request_pem=request
        )
        issued = _ask(address, enroll_pb2_grpc.EnrollStub(channel).Redeem, message)
    write_durably(folder / AUTHORITY, authority.decode("ascii"))
    write_durably(folder / SIGNER_FILE, issued.pivot_signer_pem.decode("ascii"))
    write_durably(folder / RECIPIENT_FILE, issued.fusion_worker_pem.decode("ascii"))
    write_durably(folder / CERTIFICATE, issued.certificate_pem.decode("ascii"))


def fetch_authority(address: str, wanted: str) -> bytes:
    """The authority's certificate, in PEM, from whoever answers; its fingerprint decides.

    Raises: CofuseError wrong_authority or unreachable.
    """
    with _channel(address, _shown(address)) as channel:
        reply = _ask(address, enroll_pb2_grpc.EnrollStub(channel).Authority, pb.AuthorityRequest())
    try:
        found = fingerprint(reply.certificate_pem)
    except IdentityError as error:
        raise CofuseError("wrong_authority", f"{address}: {error}") from error
    if found != wanted:
        raise CofuseError(
            "wrong_authority",
            f"{address} shows an authority with the fingerprint {found}, the token names {wanted}",
        )
    return bytes(reply.certificate_pem)


def _request(folder: Path, identity: Identity) -> bytes:
    """The signing request in the folder; it and its key are made where there is none."""
    if (folder / CERTIFICATE).exists():
        raise IdentityError(
            f"found {folder / CERTIFICATE}, wanted no certificate: choose another folder, or move "
            "the old identity away first"
        )
    if not (folder / KEY).exists():
        return new_identity(folder, identity.role, identity.name)
    return (folder / REQUEST).read_bytes()


def _ask(address: str, call: Any, message: Any) -> Any:
    try:
        with remote_errors():
            return call(message, timeout=_CALL_S)
    except grpc.RpcError as error:
        raise _unreached(address, reason(error.details())) from error


def _unreached(address: str, why: object) -> CofuseError:
    return CofuseError(
        "unreachable",
        f"{address} not reached: {why}; tokens are redeemed at a port of their own, which "
        "`cofuse coordinator invite` names",
    )


def _channel(address: str, roots: bytes) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials(roots)
    return grpc.secure_channel(address, credentials, options=CLIENT_OPTIONS)


def _shown(address: str) -> bytes:
    """The certificate that the server shows, in PEM, unchecked; through a proxy where one is set.

    gRPC dials nobody it cannot check, so it is given this one to check against.
    """
    host, _, port = address.rpartition(":")
    unchecked = ssl.create_default_context()
    unchecked.check_hostname, unchecked.verify_mode = False, ssl.CERT_NONE
    unchecked.set_alpn_protocols(["h2"])
    proxy = urlsplit("" if proxy_bypass(host) else getproxies().get("https", ""))
    through = proxy.netloc.rpartition("@")[2] or address
    connection = HTTPSConnection(through, timeout=_CALL_S, context=unchecked)
    if proxy.netloc:
        user = f"{unquote(proxy.username or '')}:{unquote(proxy.password or '')}".encode()
        password = {"Proxy-Authorization": f"Basic {b64encode(user).decode()}"}
        connection.set_tunnel(host, int(port), password if proxy.username else None)
    try:
        connection.connect()
        assert isinstance(connection.sock, ssl.SSLSocket)
        shown = connection.sock.getpeercert(binary_form=True)
    except (OSError, HTTPException) as error:
        raise _unreached(address, error) from error
    finally:
        connection.close()
    return ssl.DER_cert_to_PEM_cert(shown or b"").encode("ascii")
