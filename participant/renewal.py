"""Keeps our certificate young: from half of its life on, the coordinator is asked for a new one.

The key stays. Whoever dials next shows the new certificate; calls that are open go on under the
old one, which ends later.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Final

import grpc

from participant.durable import write_durably
from protos.errors import RemoteError, remote_errors
from protos.tls import TlsFiles, dial
from protos.v1 import enroll_pb2 as pb
from protos.v1 import enroll_pb2_grpc
from trust.identity import IdentityError, Leaf, leaf_of, public_key_bytes

_LOG = logging.getLogger(__name__)
CALL_S: Final = 30.0
LONGEST_PAUSE_S: Final = 3600.0
"""Between two looks at the calendar: a machine may have slept."""
SHORTEST_PAUSE_S: Final = 10.0
TRIES: Final = 25
"""How often at most a renewal that fails is tried again, over the half of the life that is left."""
_SPREAD: Final = 0.05
"""Share of a life: members who joined together need not renew together."""


def renew(address: str, tls: TlsFiles) -> Leaf:
    """Ask for a new certificate and put it in the old one's place; return what it says.

    Raises: IdentityError when the answer is not our identity and key, or lasts no longer.
        RemoteError, grpc.RpcError, OSError.
    """
    old = tls.certificate.read_bytes()
    with dial(address, tls) as channel, remote_errors():
        stub = enroll_pb2_grpc.EnrollStub(channel)
        new = bytes(stub.Renew(pb.RenewRequest(), timeout=CALL_S).certificate_pem)
    found = check_renewed(new, old)
    write_durably(tls.certificate, new.decode("ascii"))
    return found


def check_renewed(new: bytes, old: bytes) -> Leaf:
    """Return what a new certificate says, if it is the old one's, and lasts longer.

    Raises: IdentityError.
    """
    found, ours = leaf_of(new), leaf_of(old)
    if found.identity != ours.identity or public_key_bytes(new) != public_key_bytes(old):
        raise IdentityError(
            f"found a certificate of {found.identity.uri}, wanted one for the key of "
            f"{ours.identity.uri}: tell the operator; the old one stays"
        )
    if found.ends_unix_s <= ours.ends_unix_s:
        raise IdentityError(
            "found a new certificate that ends before the old one, wanted a later end: the "
            "operator looks at certificate_days in coordinator.toml; the old one stays"
        )
    return found


class Renewal:
    """Renews in the background, for as long as it is started."""

    def __init__(
        self,
        address: str,
        tls: TlsFiles,
        *,
        clock: Callable[[], float] = time.time,
        on_renewed: Callable[[], None] = lambda: None,
    ) -> None:
        """Args: clock: seconds since 1970, UTC: certificates end by the calendar.

        on_renewed: called when a new certificate is in place.
        """
        self._address = address
        self._tls = tls
        self._clock = clock
        self._on_renewed = on_renewed
        self._spread = random.SystemRandom().uniform(0.0, _SPREAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewal", daemon=True)

    def start(self) -> None:
        """Renew in the background; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """End; a call on its way is waited for."""
        self._stop.set()
        self._thread.join()

    def renew_if_due(self) -> bool:
        """Whether half of the certificate's life is over; then it is renewed. Raises as renew."""
        leaf = leaf_of(self._tls.certificate.read_bytes())
        if self._clock() < leaf.issued_unix_s + (0.5 + self._spread) * _life_s(leaf):
            return False
        renewed = renew(self._address, self._tls)
        _LOG.info("certificate renewed, to %s", time.ctime(renewed.ends_unix_s))
        self._on_renewed()
        return True

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self.renew_if_due()
            except grpc.RpcError as error:
                _LOG.warning("certificate not renewed, trying again: %s", error.details())
            except (RemoteError, IdentityError, OSError) as error:
                _LOG.warning("certificate not renewed, trying again: %s", error)
            self._stop.wait(self._pause_s())

    def _pause_s(self) -> float:
        try:
            life_s = _life_s(leaf_of(self._tls.certificate.read_bytes()))
        except (IdentityError, OSError):
            return LONGEST_PAUSE_S
        return min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, life_s / 2 / TRIES))


def _life_s(leaf: Leaf) -> float:
    return leaf.ends_unix_s - leaf.issued_unix_s
