"""What each of the participant's processes may reach, and how the kernel is told.

The table is WALLS. Trainer and guard have no network: a namespace of their own, with nothing in
it. The trainer writes in its own folders alone. The courier, which has the network, reads its keys,
what is to be sent, and program code: it opens neither corpus nor expert nor outbox, it writes in
its own folders, and it cannot listen. `cofuse doctor` tries to break each of these.

No privilege is needed; a kernel or a container may still refuse, and then enter() says so.
"""

import ctypes
import logging
import os
import shutil
import site
import struct
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from participant import landlock
from participant.config import ParticipantConfig
from participant.landlock import READ, WRITE, Right

Role = Literal["trainer", "guard", "courier"]
ROLES: Final[tuple[Role, ...]] = get_args(Role)
SEALED: Final = "sealed"
"""Of the data folder: what may leave. The guard writes it, the courier reads it."""
OWN: Final[Mapping[Role, tuple[str, ...]]] = {
    "trainer": ("expert", "outbox", "trainer"),
    "guard": (SEALED, "spool", "rounds", "guard"),
    "courier": ("inbox", "engine", "courier"),
}
"""Folders of the data folder in which a role makes files; the last is for whatever is passing."""

COURIER_CERTIFICATE: Final = "courier/certificate.pem"
"""Of the data folder: the certificate's copy that the courier reads. It renews it here: Landlock
would not let it open the file that takes the place of the one in the participant's folder."""

_LOG = logging.getLogger(__name__)
_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_CAPABILITIES_V3: Final = 0x20080522
_PACKAGES: Final = ("participant", "protos", "trust")
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
_RESOLVERS: Final = ("/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager", "/mnt/wsl")
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty", "shm")
_GPUS: Final = ("nvidia*", "kfd", "dri")
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wall:
    """What a process may still do once it is behind it."""

    network: bool = False
    """Whether it may dial. Nobody may listen on TCP."""
    given_up: Right = landlock.NOTHING
    """What may be done with no file but those of `allowed`."""
    allowed: tuple[tuple[Path, Right], ...] = ()


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


def wall_of(role: Role, config: ParticipantConfig) -> Wall:
    """The wall around one process of a participant."""
    return WALLS[role](config)


def enter(wall: Wall) -> Held:
    """Go behind a wall, for good, with every child to come; while there is one thread.

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


def make_folders(config: ParticipantConfig) -> None:
    """Make every role's folders: a rule can only name what is there."""
    for role in ROLES:
        for name in OWN[role]:
            (config.data_dir / name).mkdir(parents=True, exist_ok=True)


def courier_certificate(config: ParticipantConfig) -> None:
    """Give the courier the certificate as it is now. Raises: OSError."""
    shutil.copyfile(config.tls.certificate, config.data_dir / COURIER_CERTIFICATE)


def scratch(role: Role, config: ParticipantConfig) -> dict[str, str]:
    """Environment that sends what libraries leave lying about into the role's own folder."""
    place = config.data_dir / OWN[role][-1]
    names = ("TMPDIR", "XDG_CACHE_HOME", "HF_HOME", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
    return {**dict.fromkeys(names, str(place)), "TORCHINDUCTOR_CACHE_DIR": str(place)}


def _trainer(config: ParticipantConfig) -> Wall:
    own = [(path, WRITE) for path in _own("trainer", config)]
    devices = [(path, WRITE) for path in _devices(*_DEVICES, *_GPUS)]
    return Wall(given_up=WRITE | landlock.MAKE_DEVICES, allowed=(*own, *devices))


def _guard(_config: ParticipantConfig) -> Wall:
    return Wall()


def _courier(config: ParticipantConfig) -> Wall:
    own = [(path, READ | WRITE) for path in _own("courier", config)]
    shipped = [(path, READ) for path in (config.data_dir / SEALED, config.tls.ca, config.tls.key)]
    # Not all of sys.path: it may begin with the folder that the participant's lies in. Our own
    # packages are found already; everything else is installed.
    installed = (sys.prefix, sys.base_prefix, site.getusersitepackages())
    code = [*map(Path, installed), *(_package(name) for name in _PACKAGES)]
    system = [Path(name) for name in (*_SYSTEM, *_RESOLVERS)]
    devices = [(path, READ | WRITE) for path in _devices(*_DEVICES)]
    return Wall(
        network=True,
        given_up=READ | WRITE | landlock.MAKE_DEVICES,
        allowed=(
            *own,
            *shipped,
            *devices,
            *((path, READ) for path in (*code, *system)),
        ),
    )


WALLS: Final[Mapping[Role, Callable[[ParticipantConfig], Wall]]] = {
    "trainer": _trainer,
    "guard": _guard,
    "courier": _courier,
}


def _own(role: Role, config: ParticipantConfig) -> list[Path]:
    return [config.data_dir / name for name in OWN[role]]


def _devices(*patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in Path("/dev").glob(pattern)]


def _package(name: str) -> Path:
    """Where a package of ours lies, found without running it."""
    return Path(__file__).resolve().parents[1] / name


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
