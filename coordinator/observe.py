"""The end of every call: counted, logged in one line if it was refused, and never a trace."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc

from coordinator.metrics import UPLOAD_BYTES, observe_rpc
from protos.errors import CATALOGUE, CofuseError, abort
from protos.logs import logger
from trust.ca import IdentityError, identity_of

_LOG = logger(__name__)
_UPLOAD: Final = "/cofuse.v1.Transfer/Put"

Behaviour = Callable[[Any, Any], Any]


def observed(method: str, behaviour: Behaviour, *, answers_stream: bool) -> Behaviour:
    """Wrap the behaviour of one method, as the server calls it: (raw request or requests, context).

    A CofuseError that protos.errors.abort told the caller is one line of the log; any other
    exception is ours, and the caller hears of it as `internal` with a reference into the log.
    """

    def answer(request: Any, context: Any) -> Any:
        with _call(method, context):
            return behaviour(_counted(method, request), context)

    def answers(request: Any, context: Any) -> Iterator[Any]:
        with _call(method, context):
            yield from behaviour(_counted(method, request), context)

    return answers if answers_stream else answer


@contextmanager
def _call(method: str, context: Any) -> Iterator[None]:
    began = time.monotonic()
    code = grpc.StatusCode.OK
    try:
        yield
    except (GeneratorExit, grpc.RpcError):  # the caller left, or its connection did
        code = grpc.StatusCode.CANCELLED
        raise
    except Exception as error:
        refusal = error.__cause__
        if not isinstance(refusal, CofuseError):  # a fault of ours
            code = CATALOGUE["internal"].status
            _fail(method, context, error)
        else:
            code = CATALOGUE[refusal.error_id].status
            _refused(method, context, refusal)
        raise
    finally:
        observe_rpc(method, code, time.monotonic() - began)


def _refused(method: str, context: Any, refusal: CofuseError) -> None:
    _LOG.info(
        "rpc.refused",
        method=method,
        caller=_who(context),
        code=CATALOGUE[refusal.error_id].status.name,
        error_id=refusal.error_id,
        says=refusal.says,
    )


def _fail(method: str, context: Any, error: Exception) -> None:
    reference = secrets.token_hex(4)
    _LOG.error(
        "rpc.failed", method=method, caller=_who(context), reference=reference, exc_info=error
    )
    abort(context, CofuseError("internal", f"the coordinator failed at this call ({reference})"))


def _who(context: Any) -> str:
    pems = context.auth_context().get("x509_pem_cert") or ()
    try:
        return identity_of(pems[0]).uri if pems else "nobody"
    except IdentityError:
        return "unreadable"


def _counted(method: str, request: Any) -> Any:
    """The same request; the bytes of an upload are counted as they come."""
    return _count(request) if method == _UPLOAD else request


def _count(requests: Iterator[bytes]) -> Iterator[bytes]:
    for raw in requests:
        UPLOAD_BYTES.inc(len(raw))
        yield raw
