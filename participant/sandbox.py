"""What each of the participant's processes may reach: the table is WALLS.

Trainer and guard have no network: a namespace of their own, with nothing in it. The trainer writes
in its own folders alone. The courier, which has the network, reads its keys, what is to be sent,
and program code: it opens neither corpus nor expert nor outbox, it writes in its own folders, and
it cannot listen. `cofuse doctor` tries to break each of these.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, Literal, get_args

from participant.config import ParticipantConfig
from trust import walls
from trust.landlock import MAKE_DEVICES, READ, WRITE
from trust.walls import Wall

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

_PACKAGES: Final = ("participant", "protos", "trust")
_RESOLVERS: Final = ("/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager", "/mnt/wsl")


def wall_of(role: Role, config: ParticipantConfig) -> Wall:
    """The wall around one process of a participant."""
    return WALLS[role](config)


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
    return walls.scratch(config.data_dir / OWN[role][-1])


def _trainer(config: ParticipantConfig) -> Wall:
    own = [(path, WRITE) for path in _own("trainer", config)]
    return Wall(given_up=WRITE | MAKE_DEVICES, allowed=(*own, *walls.devices(WRITE, gpus=True)))


def _guard(_config: ParticipantConfig) -> Wall:
    return Wall()


def _courier(config: ParticipantConfig) -> Wall:
    own = [(path, READ | WRITE) for path in _own("courier", config)]
    shipped = (config.data_dir / SEALED, config.tls.ca, config.tls.key, *map(Path, _RESOLVERS))
    return Wall(
        network=True,
        given_up=READ | WRITE | MAKE_DEVICES,
        allowed=(
            *own,
            *((path, READ) for path in shipped),
            *walls.devices(),
            *walls.programs(_PACKAGES),
        ),
    )


WALLS: Final[Mapping[Role, Callable[[ParticipantConfig], Wall]]] = {
    "trainer": _trainer,
    "guard": _guard,
    "courier": _courier,
}


def _own(role: Role, config: ParticipantConfig) -> list[Path]:
    return [config.data_dir / name for name in OWN[role]]
