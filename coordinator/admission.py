"""The door's rules: who comes in under which certificate, how often, and who must leave again.

TLS has checked the chain and the certificate's times, but once, at the beginning of a connection
that may live for an hour. So every call is asked here again, and every open one each second.
"""

import time
from collections.abc import Callable
from typing import Any, Final, Protocol

from coordinator.access import ANYBODY, leaf_of_caller, require_grant
from coordinator.clock import now_unix_ms
from coordinator.limits import Rates
from protos.errors import CofuseError
from trust.identity import Leaf

SWEEP_S: Final = 1.0
"""How often open calls are looked through; a revocation is heard of within that."""
CALLS_PER_S: Final = 50.0
"""What one member may call in the long run; an upload is one call."""
BURST: Final = 500.0
STRANGERS_PER_S: Final = 10 / 60
"""Likewise what comes from one address to the enrolment port; joining takes two calls."""
STRANGERS_BURST: Final = 20.0


class Revoked(Protocol):
    """Which certificates count no more."""

    def revokes(self, leaf: Leaf) -> bool:
        """Whether this one does not."""

    def refresh(self) -> None:
        """Hear of those that were revoked lately; may read a database."""


class Nobody:
    """Revokes nothing."""

    def revokes(self, leaf: Leaf) -> bool:
        """Never."""
        return False

    def refresh(self) -> None:
        """There is no news."""


def now_unix_s() -> float:
    """The earlier of the wall's time and the steady clock's: one that jumps ends nothing early."""
    return min(time.time(), now_unix_ms() / 1000)


class Members:
    """Lets in who has a certificate of the authority that ends later and is not revoked."""

    mutual: Final = True

    def __init__(
        self, revoked: Revoked | None = None, *, clock: Callable[[], float] = now_unix_s
    ) -> None:
        """Args: clock: seconds since 1970, UTC: certificates end by the calendar."""
        self._revoked = revoked or Nobody()
        self._clock = clock
        self._rates = Rates(CALLS_PER_S, BURST)

    def admit(self, method: str, context: Any) -> Leaf:
        """The caller's certificate, if it may call `method` now.

        Raises: CofuseError no_identity, expired, revoked, not_allowed or too_many_calls.
        """
        leaf = leaf_of_caller(context)
        if (refusal := self.refusal(leaf)) is not None:
            raise refusal
        require_grant(method, leaf.identity.role)
        if not self._rates.take(leaf.identity.uri):
            raise _too_often(f"{CALLS_PER_S:.0f} calls a second")
        return leaf

    def refusal(self, leaf: Leaf) -> CofuseError | None:
        """Why this certificate counts no more; None: it does."""
        if not leaf.calls:
            return CofuseError("no_identity", "found a certificate that is not for callers")
        if self._clock() > leaf.ends_unix_s:
            return CofuseError("expired", f"the certificate of {leaf.identity.uri} has ended")
        if self._revoked.revokes(leaf):
            return CofuseError("revoked", f"the certificate of {leaf.identity.uri} is revoked")
        return None

    def refresh(self) -> None:
        """Hear of the latest revocations."""
        self._revoked.refresh()


class Strangers:
    """Lets in anybody, to what the table grants anybody, a few times a minute from one address."""

    mutual: Final = False

    def __init__(self) -> None:
        self._rates = Rates(STRANGERS_PER_S, STRANGERS_BURST)

    def admit(self, method: str, context: Any) -> None:
        """Raises: CofuseError not_allowed or too_many_calls."""
        require_grant(method, ANYBODY)
        if not self._rates.take(str(context.peer()).rpartition(":")[0]):
            raise _too_often(f"{STRANGERS_PER_S * 60:.0f} calls a minute from one address")

    def refusal(self, leaf: Leaf) -> CofuseError | None:
        """Nobody here has a certificate."""
        return None

    def refresh(self) -> None:
        """There is no news."""


def _too_often(allowed: str) -> CofuseError:
    return CofuseError("too_many_calls", f"found more than {allowed}")
