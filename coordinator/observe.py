"""The end of every call: counted, logged in one line if it was refused, and never a trace."""

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import grpc

from coordinator.metrics import observe_rpc
from protos.errors import CATALOGUE, CofuseError
from protos.logs import logger
from trust.ca import IdentityError, identity_of

_LOG = logger(__name__)
GONE: Final[tuple[type[BaseException], ...]] = (GeneratorExit, grpc.RpcError)
"""How a call of grpc's threaded server hears that its caller left."""


OnRefusal = Callable[[str, str, CofuseError], None]
"""Is told of a refused call: its method, the caller's URI, and why. It must not block."""


def unheard(_method: str, _caller: str, _refusal: CofuseError) -> None:
    """Nobody wants to know of refusals but the log."""


@contextmanager
def observing(
    method: str,
    context: Any,
    gone: tuple[type[BaseException], ...] = GONE,
    on_refusal: OnRefusal = unheard,
) -> Iterator[None]:
    """Watch one call of `method`, from its role check to its last message.

    A CofuseError, or an exception that protos.errors.abort made of one, passes as it is and is one
    line of the log. Any other exception is a fault of ours: the log has it under a reference, and
    it goes on as CofuseError internal, which tells the caller no more than that reference.

    Args: gone: what is raised when the caller went away; it passes unlogged. on_refusal: is told
        of every refusal beside the log.
    """
    began = time.monotonic()
    code = grpc.StatusCode.OK
    try:
        yield
    except gone:
        code = grpc.StatusCode.CANCELLED
        raise
    except Exception as error:
        refusal = error if isinstance(error, CofuseError) else error.__cause__
        if not isinstance(refusal, CofuseError):
            code = CATALOGUE["internal"].status
            raise _fault(method, context, error) from error
        code = CATALOGUE[refusal.error_id].status
        caller = _who(context)
        on_refusal(method, caller, refusal)
        _LOG.info(
            "rpc.refused",
            method=method,
            caller=caller,
            code=code.name,
            error_id=refusal.error_id,
            says=refusal.says,
        )
        raise
    finally:
        observe_rpc(method, code, time.monotonic() - began)


def _fault(method: str, context: Any, error: Exception) -> CofuseError:
    reference = secrets.token_hex(4)
    _LOG.error(
        "rpc.failed", method=method, caller=_who(context), reference=reference, exc_info=error
    )
    return CofuseError("internal", f"the coordinator failed at this call (reference {reference})")


def _who(context: Any) -> str:
    pems = context.auth_context().get("x509_pem_cert") or ()
    try:
        return identity_of(pems[0]).uri if pems else "nobody"
    except IdentityError:
        return "unreadable"
