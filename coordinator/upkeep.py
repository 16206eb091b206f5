"""What the artifact store needs now and then: drop what nobody needs, find what has decayed."""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from coordinator.artifacts import Artifacts
from coordinator.store import Store
from protos.errors import CofuseError
from protos.recurring import RecurringSpec
from protos.spec import RoundSpec

_LOG = logging.getLogger(__name__)
GRACE_S: Final = 24 * 3600.0
"""An object that nothing refers to stays for this long, and then as long again in the trash."""
PARTIAL_S: Final = 7 * 24 * 3600.0
"""An upload that nobody went on with for this long is dropped."""
SCRUB_S: Final = 7 * 24 * 3600.0
"""Every object is read and compared with its name this often."""
_PAUSE_PER_S: Final = 9.0
"""Reading takes a tenth of one core and of the disk's time."""
_TICK_S: Final = 3600.0


def references(store: Store) -> set[str]:
    """Digests that must stay: of every pivot, every contribution with a receipt, every round's
    and every recurring spec's public sets.

    Those of ended rounds too: a pivot is made again without a withdrawn member from them.
    """
    kept = {file.sha256 for pivot in store.pivots() for file in pivot.files}
    for row in store.rounds():
        kept.update(c.sha256 for c in store.contributions(row.round_id) if c.sha256)
    specs = [RoundSpec.model_validate_json(row.spec_json) for row in store.rounds()]
    specs += [RecurringSpec.model_validate_json(r.spec_json).round for r in store.recurring()]
    for spec in specs:
        pinned = (value for value in (spec.public_set, spec.evals) if value)
        kept.update(value.removeprefix("sha256:") for value in pinned)
    return kept


def collect_garbage(
    artifacts: Artifacts,
    referenced: Callable[[], set[str]],
    forget: Callable[[str], object],
    *,
    grace_s: float = GRACE_S,
) -> list[str]:
    """Take what nothing refers to off its shelf, and delete what has been off for `grace_s`.

    A commit may cross with it: what is asked for in the trash comes back (Artifacts.has), and what
    is referred to is put back here, so a receipt never outlives its bytes.
    Args: forget: told of each deleted digest. Returns: the deleted digests.
    """
    objects, deleted = artifacts.objects, []
    kept = referenced()
    for sha256, age_s in objects.walk("trash"):
        if sha256 in kept:
            objects.move(sha256, "trash", "objects")
        elif age_s > grace_s:
            objects.remove(sha256, "trash")
            if not objects.has(sha256):  # else it was asked for at this very moment
                forget(sha256)
                deleted.append(sha256)
    for sha256, age_s in objects.walk("objects"):
        if sha256 not in kept and age_s > grace_s:
            objects.move(sha256, "objects", "trash")
    return deleted


def scrub(artifacts: Artifacts, stop: threading.Event) -> list[str]:
    """Read every object; what no longer fits its name goes into quarantine.

    Returns: the damaged digests.
    """
    damaged = []
    for sha256, _ in artifacts.objects.walk("objects"):
        if stop.is_set():
            break
        try:
            artifacts.verify(sha256, pause=lambda spent_s: stop.wait(spent_s * _PAUSE_PER_S))
        except CofuseError as error:
            if error.error_id == "damaged_artifact":
                damaged.append(sha256)
    return damaged


class Upkeep:
    """A thread that does both on time."""

    def __init__(
        self,
        artifacts: Artifacts,
        store: Store,
        stamp: Path,
        renew: Callable[[], object] = lambda: None,
    ) -> None:
        """Args: stamp: a file whose age is that of the last whole scrub, across restarts.

        renew: called before all else, each time: what nobody refers to any more goes then.
        """
        self._renew = renew
        self._artifacts = artifacts
        self._store = store
        self._stamp = stamp
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, between two chunks."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._renew()
                self._artifacts.drop_partials(older_than_s=PARTIAL_S)
                collect_garbage(
                    self._artifacts, lambda: references(self._store), self._store.forget_artifact
                )
                self._scrub_if_due()
            except Exception:  # noqa: BLE001 - upkeep that died in silence would never be missed
                _LOG.exception("upkeep failed; it is tried again in an hour")
            self._stop.wait(_TICK_S)

    def _scrub_if_due(self) -> None:
        if not self._artifacts.objects.decays:
            return
        if not self._stamp.exists():
            self._stamp.touch()
        if time.time() - self._stamp.stat().st_mtime > SCRUB_S:
            scrub(self._artifacts, self._stop)
            if not self._stop.is_set():
                self._stamp.touch()
