"""Signs the coordinator's audit chain, while it serves."""

import logging
import threading
import time
from pathlib import Path
from typing import Final

from coordinator.audit import FOLDER
from coordinator.clock import now_unix_ms
from coordinator.store import Store
from protos.errors import CofuseError
from trust.audit_files import KEY
from trust.checkpoints import CHECKPOINT_EVERY, CHECKPOINT_S, make_checkpoint
from trust.keys import load_private, new_key

_LOG = logging.getLogger(__name__)
_PAUSE_S: Final = 1.0
"""Between two looks at a busy chain."""


class Auditor:
    """Looks after the checkpoints in a thread, until stopped."""

    def __init__(self, store: Store, data_dir: Path) -> None:
        """Make the key where there is none.

        Raises: KeyFileError, OSError.
        """
        path = data_dir / FOLDER / KEY
        if not path.exists():
            new_key(path)
        self._key = load_private(path)
        self._store = store
        self._signed = store.signed_seq()
        self._since = float("-inf")  # when the oldest unsigned record came, nobody knows
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="auditor")

    def start(self) -> None:
        """Look after it from now on."""
        self._thread.start()

    def stop(self) -> None:
        """Sign what is not signed yet, and end."""
        self._stop.set()
        with self._store.changed:
            self._store.changed.notify_all()
        self._thread.join()
        self._look(must=True)

    def _run(self) -> None:
        while not self._stop.is_set():
            self._look()
            with self._store.changed:
                if not self._stop.is_set():
                    self._store.changed.wait(CHECKPOINT_S)
            self._stop.wait(_PAUSE_S)

    def _look(self, *, must: bool = False) -> None:
        try:
            head = self._store.audit_head()
            if head.seq == self._signed:
                self._since = time.monotonic()
                return
            due = head.seq - self._signed >= CHECKPOINT_EVERY
            if must or due or time.monotonic() - self._since >= CHECKPOINT_S:
                self._store.sign_audit(make_checkpoint(self._key, head, now_unix_ms()))
                self._signed, self._since = head.seq, time.monotonic()
        except CofuseError as error:  # a full disk, or a server that is away: it passes
            _LOG.warning("the audit chain was not signed: %s; it is tried again", error)
