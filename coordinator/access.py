"""Who may call what: one table, deny by default, enforced before a request is parsed."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import grpc
from google.protobuf.message import DecodeError

from coordinator.observe import observing
from protos.bounds import check_bounds
from protos.errors import CofuseError, abort
from protos.v1 import transfer_pb2
from trust.ca import Identity, IdentityError, identity_of

_RESEARCH: Final = frozenset({"researcher", "operator"})
_ALL: Final = frozenset({"participant", "researcher", "operator"})
ROLES: Final[Mapping[str, frozenset[str]]] = {
    "/cofuse.v1.Transfer/Stat": _ALL,
    "/cofuse.v1.Transfer/Put": _ALL,
    "/cofuse.v1.Transfer/Get": _ALL,
    "/cofuse.v1.Fleet/Join": frozenset({"participant"}),
    "/cofuse.v1.Fleet/CommitContribution": frozenset({"participant"}),
    "/cofuse.v1.Research/SubmitRound": _RESEARCH,
    "/cofuse.v1.Research/ApproveRound": frozenset({"operator"}),
    "/cofuse.v1.Research/CancelRound": _RESEARCH,
    "/cofuse.v1.Research/GetRound": _RESEARCH,
    "/cofuse.v1.Research/ListRounds": _RESEARCH,
    "/cofuse.v1.Research/WatchRound": _RESEARCH,
    "/cofuse.v1.Research/ListParticipants": _RESEARCH,
    "/cofuse.v1.Research/ImportPivot": frozenset({"operator"}),
    "/cofuse.v1.Research/GetPivot": _RESEARCH,
    "/cofuse.v1.Research/ListPivots": _RESEARCH,
    # An operator's alone: the rounds it makes are approved.
    "/cofuse.v1.Recurring/StartRecurring": frozenset({"operator"}),
    "/cofuse.v1.Recurring/StopRecurring": frozenset({"operator"}),
    "/cofuse.v1.Recurring/ListRecurring": _RESEARCH,
    "/cofuse.v1.Research/Why": _RESEARCH,
    "/grpc.health.v1.Health/Check": _ALL,
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
    pems = context.auth_context().get("x509_pem_cert") or ()
    if not pems:
        raise CofuseError("no_identity", "found no client certificate")
    try:
        return identity_of(pems[0])
    except IdentityError as error:
        raise CofuseError("no_identity", str(error)) from error


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


class RoleInterceptor(grpc.ServerInterceptor):  # type: ignore[type-arg]
    """Refuses every RPC that the table does not grant to the caller's role.

    The request's bytes are parsed only after that: who may not call is not read.
    """

    def intercept_service(self, continuation: Callable[..., Any], details: Any) -> Any:
        """Wrap the handler with the check; unknown methods stay unknown."""
        handler = continuation(details)
        if handler is None:
            return None
        kinds = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")
        kind = next(name for name in kinds if getattr(handler, name))
        behaviour, streams = getattr(handler, kind), kind.startswith("stream")

        def request_of(raw: Any, context: Any) -> Any:
            _require_role(details.method, context)
            parse = handler.request_deserializer
            return _parsed(raw, parse) if streams else _parse(raw, parse)

        def answer(raw: Any, context: Any) -> Any:
            try:
                with observing(details.method, context):
                    return behaviour(request_of(raw, context), context)
            except CofuseError as error:
                abort(context, error)

        def answers(raw: Any, context: Any) -> Iterator[Any]:
            try:
                with observing(details.method, context):
                    yield from behaviour(request_of(raw, context), context)
            except CofuseError as error:
                abort(context, error)

        make = getattr(grpc, f"{kind}_rpc_method_handler")
        wrapped = answers if kind.endswith("_stream") else answer
        return make(wrapped, response_serializer=handler.response_serializer)


def _require_role(method: str, context: Any) -> None:
    who = caller(context)
    if who.role not in ROLES.get(method, frozenset()):
        raise CofuseError("not_allowed", f"{method} is not for the role {who.role}")


def _parse(raw: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        message = parse(raw)
    except DecodeError as error:
        raise CofuseError("bad_request", "found bytes that are no message of this call") from error
    check_bounds(message)
    return message


def _parsed(raw: Iterator[bytes], parse: Callable[[bytes], Any]) -> Iterator[Any]:
    for message in raw:
        yield _parse(message, parse)
