"""How one becomes known and stays it: gRPC in and out; coordinator/invitations.py decides."""

from pathlib import Path
from typing import Any

from coordinator.access import caller, certificate_of
from coordinator.invitations import Invitations
from protos.errors import CofuseError, abort
from protos.logs import logger
from protos.v1 import enroll_pb2 as pb
from protos.v1 import enroll_pb2_grpc
from trust.ca import renew, sign_request
from trust.identity import Identity, IdentityError, leaf_of
from trust.pivot_manifest import SIGNER_FILE
from trust.seal_keys import RECIPIENT_FILE

_LOG = logger(__name__)


class EnrollService(enroll_pb2_grpc.EnrollServicer):
    """Authority, Redeem and Renew; which port answers which is the table's (access.py)."""

    def __init__(
        self, invitations: Invitations, ca: Path, authority: Path | None, days: float
    ) -> None:
        """Args: ca: the authority's certificate; the hub's other public keys lie beside it.

        authority: folder with the authority's key; None: it is elsewhere.
        days: how long a certificate made here lasts.
        """
        self._invitations = invitations
        self._ca = ca
        self._authority = authority
        self._days = days

    def Authority(self, request: pb.AuthorityRequest, context: Any) -> pb.AuthorityReply:
        """Give the authority's certificate, which is no secret."""
        return pb.AuthorityReply(certificate_pem=self._ca.read_bytes())

    def Redeem(self, request: pb.RedeemRequest, context: Any) -> pb.Issued:
        """Turn an invitation into a certificate."""
        try:
            pem = self._invitations.redeem(
                request.invitation, request.secret, request.request_pem, self._issue
            )
        except CofuseError as error:
            abort(context, error)
        _LOG.info("enroll.redeemed", invitation=request.invitation, **_named(pem))
        signer, worker = (self._ca.with_name(n) for n in (SIGNER_FILE, RECIPIENT_FILE))
        return pb.Issued(
            certificate_pem=pem,
            pivot_signer_pem=signer.read_bytes(),
            fusion_worker_pem=worker.read_bytes(),
        )

    def Renew(self, request: pb.RenewRequest, context: Any) -> pb.Issued:
        """Issue the caller's certificate again, for the same key."""
        try:
            pem = renew(self._folder(), certificate_of(context), self._days)
        except CofuseError as error:
            abort(context, error)
        _LOG.info("enroll.renewed", caller=caller(context).uri, **_named(pem))
        return pb.Issued(certificate_pem=pem)

    def _issue(self, identity: Identity, request: bytes) -> bytes:
        try:
            return sign_request(
                self._folder(), request, role=identity.role, name=identity.name, days=self._days
            )
        except IdentityError as error:
            raise CofuseError("bad_request", f"request_pem: {error}") from error

    def _folder(self) -> Path:
        if self._authority is None:
            raise CofuseError("no_authority", "this coordinator does not issue certificates")
        return self._authority


def _named(pem: bytes) -> dict[str, str]:
    """A certificate's identity and serial, for the log."""
    leaf = leaf_of(pem)
    return {"identity": leaf.identity.uri, "serial": str(leaf.serial)}
