"""Child processes that never outlive their parent."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any, Final

PARENT_VARIABLE: Final = "COFUSE_PARENT_PID"
GIVES_WAY: Final = 10
"""The niceness of what computes for hours: it gets a tenth of a core that both want."""
_PR_SET_PDEATHSIG: Final = 1


def spawn(
    module: str,
    arguments: Sequence[str],
    *,
    stdin: int | IO[Any] | None = subprocess.DEVNULL,
    stderr: int | IO[Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> "subprocess.Popen[str]":
    """Start `python -m module` in a process group of its own, tied to this process.

    The group keeps a terminal's Ctrl-C to the parent, which ends its children in order.
    The child's main calls die_with_parent().
    """
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env={**os.environ, **(environment or {}), PARENT_VARIABLE: str(os.getpid())},
    )


def give_way(child: "subprocess.Popen[Any]") -> None:
    """Let a child that has just been started compute where nobody waits: who answers goes first.

    What it starts itself gives way too.
    """
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, child.pid, max(ours, GIVES_WAY))


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Ask the kernel to end this process, by a signal, when who spawned it is gone (Linux)."""
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != int(parent):  # it died before the line above
        raise SystemExit(0)


def on_stop_signal(callback: Callable[[], object]) -> None:
    """Call `callback` once, in a thread of its own, when SIGTERM or SIGINT comes.

    The handler itself only writes a byte: whatever takes a lock (Event.set does) may deadlock in
    a handler, and a dying parent's threads send the signal several times over.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)

    def wake(_number: int, _frame: object) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(write_end, b"x")

    def wait() -> None:
        os.read(read_end, 1)
        callback()

    threading.Thread(target=wait, name="stop-signal", daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, wake)


def end(process: "subprocess.Popen[str]", grace_s: float = 10.0) -> None:
    """SIGTERM, then SIGKILL to the whole group after `grace_s`."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
