"""Who may call what: one table, deny by default. coordinator/admission.py holds calls to it."""

from collections.abc import Mapping
from typing import Any, Final

from protos.errors import CofuseError
from protos.v1 import transfer_pb2
from trust.identity import Identity, IdentityError, Leaf, leaf_of

ANYBODY: Final = "anybody"
"""Whoever reaches the enrolment port. It is nobody's role at the other one, whose callers have a
certificate."""
_MEMBERS: Final = frozenset({"participant", "researcher", "operator"})
_RESEARCH: Final = frozenset({"researcher", "operator"})
ROLES: Final[Mapping[str, frozenset[str]]] = {
    "/cofuse.v1.Enroll/Authority": frozenset({ANYBODY}),
    "/cofuse.v1.Enroll/Redeem": frozenset({ANYBODY}),
    "/cofuse.v1.Enroll/Renew": _MEMBERS,  # each its own certificate only: it names no other
    "/cofuse.v1.Transfer/Stat": _MEMBERS,
    "/cofuse.v1.Transfer/Put": _MEMBERS,
    "/cofuse.v1.Transfer/Get": _MEMBERS,
    "/cofuse.v1.Fleet/Join": frozenset({"participant"}),
    "/cofuse.v1.Fleet/Attend": frozenset({"participant"}),
    "/cofuse.v1.Fleet/CommitContribution": frozenset({"participant"}),
    "/cofuse.v1.Research/SubmitRound": _RESEARCH,
    "/cofuse.v1.Research/ApproveRound": frozenset({"operator"}),
    "/cofuse.v1.Research/CancelRound": _RESEARCH,  # a researcher, their own only
    "/cofuse.v1.Research/GetRound": _RESEARCH,
    "/cofuse.v1.Research/ListRounds": _RESEARCH,
    "/cofuse.v1.Research/WatchRound": _RESEARCH,
    "/cofuse.v1.Research/ListParticipants": _RESEARCH,
    "/cofuse.v1.Research/ImportPivot": frozenset({"operator"}),
    "/cofuse.v1.Research/RollbackPivot": frozenset({"operator"}),
    "/cofuse.v1.Research/PromotePivot": frozenset({"operator"}),  # two of them, where so configured
    "/cofuse.v1.Research/GetPivot": _RESEARCH,
    "/cofuse.v1.Research/ListPivots": _RESEARCH,
    # An operator's alone: the rounds it makes are approved.
    "/cofuse.v1.Recurring/StartRecurring": frozenset({"operator"}),
    "/cofuse.v1.Recurring/StopRecurring": frozenset({"operator"}),
    "/cofuse.v1.Recurring/ListRecurring": _RESEARCH,
    "/cofuse.v1.Research/Why": _RESEARCH,
    "/grpc.health.v1.Health/Check": _MEMBERS,
    # Each holds a thread for as long as it likes.
    "/grpc.health.v1.Health/Watch": frozenset({"operator"}),
}
PUT_ROLES: Final[Mapping[str, frozenset[str]]] = {
    "PROMPTS": _RESEARCH,
    "EVALS": _RESEARCH,
    "CONTRIBUTION": frozenset({"participant"}),
    "PIVOT": frozenset({"operator"}),
}
GET_KINDS: Final[Mapping[str, frozenset[str]]] = {
    # A contribution is for the fusion worker alone: no role may read one back.
    "participant": frozenset({"PROMPTS", "EVALS", "PIVOT"}),
    "researcher": frozenset({"PROMPTS", "EVALS", "PIVOT"}),
    "operator": frozenset({"PROMPTS", "EVALS", "PIVOT"}),
}


def caller(context: Any) -> Identity:
    """The identity in the client certificate of this call.

    Raises: CofuseError no_identity.
    """
    return leaf_of_caller(context).identity


def leaf_of_caller(context: Any) -> Leaf:
    """The client certificate of this call.

    Raises: CofuseError no_identity.
    """
    known = getattr(context, "leaf", None)  # of the console, which signs people in by itself
    if isinstance(known, Leaf):
        return known
    try:
        return leaf_of(certificate_of(context))
    except IdentityError as error:
        raise CofuseError("no_identity", str(error)) from error


def certificate_of(context: Any) -> bytes:
    """The client certificate of this call, in PEM.

    Raises: CofuseError no_identity.
    """
    pems = context.auth_context().get("x509_pem_cert") or ()
    if not pems:
        raise CofuseError("no_identity", "found no client certificate")
    return bytes(pems[0])


def kind_name(kind: int, role: str) -> str:
    """Name of an artifact kind that `role` may put.

    Raises: CofuseError bad_request or not_allowed.
    """
    names = {value: name for name, value in transfer_pb2.ArtifactKind.items()}
    name = names.get(kind, "")
    if name not in PUT_ROLES:
        raise CofuseError("bad_request", f"kind: found {kind}, wanted {', '.join(PUT_ROLES)}")
    if role not in PUT_ROLES[name]:
        raise CofuseError("not_allowed", f"a {role} may not put files of kind {name}")
    return name


def require_grant(method: str, role: str) -> None:
    """Refuse what the table does not grant.

    Raises: CofuseError not_allowed.
    """
    if role not in ROLES.get(method, frozenset()):
        raise CofuseError("not_allowed", f"{method} is not for the role {role}")
