"""The error catalogue: what a caller can be told, with the remedy. One row per error."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn

import grpc

from protos.printable import printable

ERROR_KEY: Final = "cofuse-error"
"""Trailing metadata that carries the error id, so that programs need not parse words."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One error: its gRPC status and the remedy shown with it."""

    status: grpc.StatusCode
    do: str


_S = grpc.StatusCode
CATALOGUE: Final[dict[str, Entry]] = {
    "not_allowed": Entry(_S.PERMISSION_DENIED, "use a certificate of a role that may do this"),
    "own_round": Entry(
        _S.PERMISSION_DENIED, "ask another operator: a round takes the yes of two people"
    ),
    "no_identity": Entry(
        _S.UNAUTHENTICATED, "present a client certificate issued by this coordinator's authority"
    ),
    "revoked": Entry(
        _S.PERMISSION_DENIED,
        "ask the operator why; a new invitation (cofuse join) gives a new certificate",
    ),
    "expired": Entry(
        _S.UNAUTHENTICATED,
        "call again with the renewed certificate, or ask the operator for a new invitation",
    ),
    "bad_invitation": Entry(
        _S.PERMISSION_DENIED,
        "check that the token is whole; else ask the operator for a new one "
        "(cofuse coordinator invite)",
    ),
    "no_authority": Entry(
        _S.FAILED_PRECONDITION,
        "the operator names the authority's folder as `authority` in coordinator.toml, or signs "
        "requests by hand (cofuse coordinator sign)",
    ),
    "bad_request": Entry(_S.INVALID_ARGUMENT, "correct the field and send it again"),
    "bad_spec": Entry(_S.INVALID_ARGUMENT, "correct the round spec and submit it again"),
    "unknown_round": Entry(_S.NOT_FOUND, "list the rounds with: cofuse round ls"),
    "unknown_name": Entry(
        _S.NOT_FOUND, "names are those that round ls, ps, pivot ls and recurring ls show"
    ),
    "unknown_recurring": Entry(_S.NOT_FOUND, "list the recurring rounds with: cofuse recurring ls"),
    "unknown_pivot": Entry(_S.NOT_FOUND, "list the pivots with: cofuse pivot ls"),
    "unknown_participant": Entry(
        _S.NOT_FOUND, "let it join first (cofuse participant up), or leave it out of the spec"
    ),
    "unknown_artifact": Entry(_S.NOT_FOUND, "upload the file first; check its sha256"),
    "not_promoted": Entry(
        _S.FAILED_PRECONDITION, "another operator looks at it and says: cofuse pivot promote NAME"
    ),
    "untrusted_pivot": Entry(
        _S.DATA_LOSS, "do not use it, keep the pivot you have, and tell the operator"
    ),
    "wrong_state": Entry(_S.FAILED_PRECONDITION, "look at the round with: cofuse round show ID"),
    "wrong_offset": Entry(_S.FAILED_PRECONDITION, "ask Stat where to go on, and go on there"),
    "wrong_digest": Entry(
        _S.DATA_LOSS, "the bytes on disk changed or were damaged on the way; send the file again"
    ),
    "wrong_chunk": Entry(_S.DATA_LOSS, "ask where to go on, and send that chunk again"),
    "damaged_artifact": Entry(
        _S.DATA_LOSS,
        "put the file in again (a pivot: cofuse pivot import, or the backup); the damaged copy is "
        "in artifacts/quarantine",
    ),
    "stalled": Entry(
        _S.DEADLINE_EXCEEDED,
        "check the network between the two; a repetition goes on where this ended",
    ),
    "storage_full": Entry(
        _S.RESOURCE_EXHAUSTED,
        "the operator frees space on the coordinator's disk; transfers then go on by themselves",
    ),
    "storage_unreachable": Entry(
        _S.UNAVAILABLE,
        "the operator checks the object store's address and credentials (docs/operator.md)",
    ),
    "too_many_uploads": Entry(
        _S.RESOURCE_EXHAUSTED, "finish some of them, or wait until the coordinator drops old ones"
    ),
    "truncated_upload": Entry(_S.DATA_LOSS, "ask Stat where to go on, and send the rest"),
    "too_large": Entry(_S.RESOURCE_EXHAUSTED, "ship less (a smaller K), or ask for a higher limit"),
    "wrong_authority": Entry(
        _S.UNAVAILABLE,
        "check that ca.pem is that of this coordinator, and that the address is the right one",
    ),
    "unreachable": Entry(
        _S.UNAVAILABLE,
        "check address and network, and that certificate.pem was issued by its authority",
    ),
    "store_unavailable": Entry(
        _S.UNAVAILABLE, "try again; if it stays so, look into the coordinator's log"
    ),
    "unknown_service": Entry(_S.NOT_FOUND, "ask without a service name"),
    "stopping": Entry(_S.UNAVAILABLE, "connect again in a moment; it goes on where it was"),
    "not_joined": Entry(_S.FAILED_PRECONDITION, "call Join first, and attend then"),
    "too_many_calls": Entry(
        _S.RESOURCE_EXHAUSTED, "let one program run under one certificate, and call less often"
    ),
    "internal": Entry(
        _S.INTERNAL, "give the reference to the operator: the coordinator's log tells more there"
    ),
    "bad_contribution": Entry(
        _S.INVALID_ARGUMENT,
        "make the contribution again from the assignment; the round still waits for it",
    ),
}


class CofuseError(Exception):
    """An error of the catalogue: an id, and a sentence with what was found and wanted."""

    def __init__(self, error_id: str, says: str) -> None:
        self.error_id = error_id
        self.says = says
        super().__init__(f"{says}. {CATALOGUE[error_id].do}.")


class RemoteError(Exception):
    """What the other side refused, in its words."""

    def __init__(self, error_id: str, message: str) -> None:
        self.error_id = error_id
        super().__init__(message)


def abort(context: Any, error: CofuseError) -> NoReturn:
    """End the RPC with the catalogue's status, the words, and the id in trailing metadata.

    Raises: what gRPC ends a call with, caused by `error`: coordinator/observe.py logs that.
    """
    context.set_trailing_metadata(((ERROR_KEY, error.error_id),))
    try:
        context.abort(CATALOGUE[error.error_id].status, printable(str(error)))
    except Exception as ended:
        raise ended from error
    raise AssertionError("abort returned")


@contextmanager
def remote_errors() -> Iterator[None]:
    """Turn a refusal from the other side into RemoteError.

    Lost connections, and those that a stopping coordinator ends, stay as they are: try again.
    """
    try:
        yield
    except grpc.RpcError as error:
        trailing: Any = getattr(error, "trailing_metadata", lambda: ())() or ()
        for key, value in trailing:
            if key == ERROR_KEY and value != "stopping":
                raise RemoteError(str(value), str(error.details())) from None
        if "CERTIFICATE_VERIFY_FAILED" in str(error.details()):
            says = "the other side shows a certificate that our ca.pem did not sign"
            refusal = CofuseError("wrong_authority", says)
            raise RemoteError("wrong_authority", str(refusal)) from None
        raise
