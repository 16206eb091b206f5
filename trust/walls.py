"""What a process may reach, and how the kernel is told; who is behind which wall others say.

No privilege is needed; a kernel or a container may still refuse, and then enter() says so.
"""

import ctypes
import logging
import os
import site
import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trust import landlock
from trust.landlock import READ, WRITE, Right

_LOG = logging.getLogger(__name__)
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_CAPABILITIES_V3: Final = 0x20080522
_SYSTEM: Final = (
    "/usr",
    "/lib",
    "/lib64",
    "/bin",
    "/etc",
    "/proc",
    "/sys/devices",
    "/sys/fs/cgroup",
)
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty", "shm")
_GPUS: Final = ("nvidia*", "kfd", "dri")
_LIBC: Final = ctypes.CDLL(None, use_errno=True)

Allowed = tuple[tuple[Path, Right], ...]
"""Files, and folders with what lies beneath; and what may be done with them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wall:
    """What a process may still do once it is behind it."""

    network: bool = False
    """Whether it may dial. Nobody may listen on TCP."""
    given_up: Right = landlock.NOTHING
    """What may be done with no file but those of `allowed`."""
    allowed: Allowed = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Which parts of a wall the kernel agreed to keep up."""

    namespace: str = ""
    """Why there is no network namespace of our own; empty: there is, or none is wanted."""
    landlock: str = ""
    """Why Landlock does not hold; empty: it does."""
    abi: int = 0
    """Version of Landlock: TCP from 4 on, signals and abstract sockets from 6 on."""

    @property
    def missing(self) -> tuple[str, ...]:
        """What a person must know, a sentence each; empty: all of it holds."""
        return tuple(words for words in (self.namespace, self.landlock) if words)


def enter(wall: Wall) -> Held:
    """Go behind a wall, for good, with every child to come; while there is one thread.

    A signal that was asked for at the parent's death may be forgotten: ask again.
    Returns: what of it holds. What the platform refuses is not there, and is no error here.
    """
    namespace = "" if wall.network else _leave_network()
    version = landlock.abi()
    refused = (
        "" if version else "found a kernel without Landlock, wanted 5.13 with lsm=...,landlock"
    )
    if version:
        try:
            landlock.restrict(wall.given_up, wall.allowed, tcp=wall.network)
        except OSError as error:
            refused = f"Landlock: {error.strerror}"
    return Held(namespace=namespace, landlock=refused, abi=0 if refused else version)


def programs(packages: Iterable[str]) -> Allowed:
    """Program code and the system's own files, to read: what any Python program needs.

    Not all of sys.path: it may begin with the folder that the secrets lie in. Our own packages are
    found already, when they were imported; everything else is installed.
    """
    ours = Path(__file__).resolve().parents[1]
    installed = (sys.prefix, sys.base_prefix, site.getusersitepackages())
    code = [*map(Path, installed), *(ours / name for name in packages)]
    return tuple((path, READ) for path in (*code, *map(Path, _SYSTEM)))


def devices(right: Right = READ | WRITE, *, gpus: bool = False) -> Allowed:
    """What of /dev any program needs, and graphics cards where they are wanted."""
    patterns = _DEVICES + (_GPUS if gpus else ())
    return tuple((path, right) for one in patterns for path in Path("/dev").glob(one))


def scratch(place: Path) -> dict[str, str]:
    """Environment that sends what libraries leave lying about into one folder."""
    names = ("TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    return {**dict.fromkeys(names, str(place)), "TORCHINDUCTOR_CACHE_DIR": str(place)}


def _leave_network() -> str:
    """Move to a network with nothing in it; return why that was not possible, or nothing.

    It takes a user namespace, in which nobody is anybody but who they were. The powers over it
    that come with it are dropped, so that nobody can make a network there.
    """
    user, group = os.getuid(), os.getgid()
    if _LIBC.unshare(_CLONE_NEWUSER | _CLONE_NEWNET):
        reason = os.strerror(ctypes.get_errno())
        return (
            f"found no leave to make a network namespace ({reason}), wanted one without a network"
        )
    try:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    except OSError as error:  # we stay who we are to every file, but do not know our own name
        _LOG.warning("the user namespace has no names: %s", error.strerror)
    header = ctypes.create_string_buffer(struct.pack("=Ii", _CAPABILITIES_V3, 0))
    if _LIBC.capset(header, ctypes.create_string_buffer(24)):  # they reach no other namespace
        _LOG.warning("powers over the empty network stay: %s", os.strerror(ctypes.get_errno()))
    return ""
