"""The short daily verbs: `login`, `ps`, `up`, `status`, `pause`, `resume`, `leave`.

They find the folder by themselves: the one that is named, the one where they are said, or, of a
participant, the one that `cofuse login` remembers.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from cofuse.commands import participants
from cofuse.commands.connection import At, Identity, answer, connected, fail, say, tell
from cofuse.profile import forget, profile_path, remember, remembered

PROGRAMS: Final = {"participant.toml": "participant", "coordinator.toml": "coordinator"}
Folder = Annotated[
    Path | None, typer.Argument(help="A participant's or coordinator's folder.  [this one]")
]
Participant = Annotated[Path | None, typer.Argument(help="The participant's folder.  [this one]")]
_READY_S: Final = 3.0
_UNIT: Final = """\
# A service of this user; deploy/systemd/ has one for the whole machine, closed to all it needs not.
[Unit]
Description=cofuse {program} {folder}
After=network-online.target
Wants=network-online.target

[Service]
Type=exec
ExecStart={python} -m cofuse.cli up {folder}
WorkingDirectory={folder}
Restart=always
RestartSec=15
TimeoutStopSec=120
KillMode=mixed
UMask=0077

[Install]
WantedBy=default.target
"""


def login(
    address: Annotated[str, typer.Argument(help="host:port of the coordinator.")],
    identity: Annotated[Path, typer.Argument(help="Folder with your key and certificate.")],
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Ask the coordinator who is there first.")
    ] = True,
) -> None:
    """Remember coordinator and identity, so that no later command needs --at and --identity."""
    if check:
        with connected(address, identity) as coordinator:
            coordinator.pivots()
    path = remember(address, identity)
    say(f"remembered in {path}; forget it with: cofuse logout")
    answer({"at": address, "identity": str(identity.resolve()), "profile": str(path)})


def logout() -> None:
    """Forget what `cofuse login` remembered; the identity's folder stays."""
    path, there = profile_path(), forget()
    say(f"forgot {path}" if there else "nobody was logged in")
    answer({"forgot": there})


def ps(at: At, identity: Identity) -> None:
    """Show who takes part, who is here now, and what each is waited for in open rounds."""
    with connected(at, identity) as coordinator:
        members = coordinator.participants()
        rounds = [found for found in coordinator.rounds() if not found.final]
    rows: list[dict[str, Any]] = []
    for name, here in members.items():
        work = {
            found.round_id: part.status
            for found in rounds
            for part in found.contributions
            if part.participant == name
        }
        rows.append({"participant": name, "attending": here, "rounds": work})
    tell(f"{'participant':<20} {'now':<8} open rounds")
    for row in rows:
        waits = " ".join(f"{key}:{value}" for key, value in row["rounds"].items())
        now = "here" if row["attending"] else "away"
        tell(f"{row['participant']:<20} {now:<8} {waits}".rstrip())
    for found in rounds:
        tell(f"{found.round_id} {found.spec.name}: {found.state}")
    answer(
        {
            "participants": rows,
            "open_rounds": [
                {"round_id": one.round_id, "name": one.spec.name, "state": one.state}
                for one in rounds
            ],
        }
    )


def up(
    folder: Folder = None,
    install: Annotated[
        bool, typer.Option("--install", help="Write a systemd unit of this user instead.")
    ] = False,
) -> None:
    """Run what the folder holds, a participant or a coordinator, until Ctrl-C."""
    home, file = _program(folder)
    program = PROGRAMS[file]
    if install:
        name = f"cofuse-{program}-{home.name}.service"
        unit = Path.home() / ".config" / "systemd" / "user" / name
        unit.parent.mkdir(parents=True, exist_ok=True)
        text = _UNIT.format(program=program, folder=home, python=sys.executable)
        unit.write_text(text, encoding="utf-8")
        tell(unit)
        say(f"start it with: systemctl --user enable --now {name}")
        say("and let it run without you: loginctl enable-linger")
        answer({"unit": str(unit)})
        return
    if program == "participant":
        participants.up(home)
    from coordinator.main import main

    raise typer.Exit(main([str(home / file)]))


def status(folder: Folder = None) -> None:
    """Tell what the program in the folder is doing and what it waits for."""
    home, file = _program(folder)
    if PROGRAMS[file] == "participant":
        participants.status(home)
        return
    from coordinator.config import load_config

    at = load_config(home / file).ops_listen
    found = _readyz(at)
    if found is None:
        fail(f"no coordinator answers at http://{at}/readyz", code="not_running")
    tell("ready" if found["ready"] else "NOT ready")
    for what, words in found["problems"].items():
        tell(f"  {what}: {words}")
    answer(found)


def pause(folder: Participant = None, until: participants.Until = "") -> None:
    """Let no work be begun, and what runs stop at its next step, until `resume` or the time."""
    participants.pause(_participant(folder), until)


def resume(folder: Participant = None) -> None:
    """Let work go on where `pause` stopped it."""
    participants.resume(_participant(folder))


def leave(
    folder: Participant = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Leave the consortium: the key is destroyed, so that nothing can ever be sent in your name.

    The text, the expert and the audit chain stay. To come back, ask for a new invitation.
    """
    from participant.config import load_config
    from participant.status import read_status

    home = _participant(folder)
    config = load_config(home / "participant.toml")
    if config.data_dir.is_dir() and read_status(config.data_dir) is not None:
        fail(f"a daemon runs on {home}; stop it first", code="running")
    if not yes and not typer.confirm(f"destroy the key of participant/{config.name}?"):
        fail("nothing was done", code="stopped")
    gone = [path for path in (config.tls.key, config.tls.certificate) if path.exists()]
    for path in gone:
        path.unlink()
    say(
        f"{config.name} has left. Tell the operator, who says: cofuse coordinator revoke HUB "
        f"--name participant/{config.name}"
    )
    answer({"participant": config.name, "destroyed": [str(path) for path in gone]})


def _program(folder: Path | None) -> tuple[Path, str]:
    """The folder that is meant, and the file that tells what it is."""
    said = remembered("identity")
    places = [folder] if folder else [Path(), *([Path(said)] if said else [])]
    for place in places:
        for file in PROGRAMS:
            if (place / file).is_file():
                return place.resolve(), file
    fail(f"{places[0].resolve()}: found neither {' nor '.join(PROGRAMS)}", code="no_folder")


def _participant(folder: Path | None) -> Path:
    home, file = _program(folder)
    if PROGRAMS[file] != "participant":
        fail(f"{home} is a coordinator's folder, wanted a participant's", code="no_folder")
    return home


def _readyz(at: str) -> dict[str, Any] | None:
    """What the coordinator says of itself; None when nobody answers."""
    import json
    from http.client import HTTPConnection, HTTPException

    connection = HTTPConnection(at, timeout=_READY_S)
    try:
        connection.request("GET", "/readyz")
        found: dict[str, Any] = json.loads(connection.getresponse().read())
    except (OSError, HTTPException, ValueError):
        return None
    finally:
        connection.close()
    return found
