"""What `cofuse login` remembers: where the coordinator is, and whose identity asks it.

An option is stronger than its environment variable, and that than the profile. No secret is in it:
the key stays in the identity's folder.
"""

import json
import os
import tomllib
from pathlib import Path
from typing import Final

KEYS: Final = ("at", "identity")


def profile_path() -> Path:
    """Where the profile is: $COFUSE_PROFILE, or below $XDG_CONFIG_HOME."""
    if named := os.environ.get("COFUSE_PROFILE"):
        return Path(named)
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "cofuse" / "profile.toml"


def remembered(key: str) -> str:
    """One of KEYS; "" when nobody has logged in, or the file is not one that `remember` wrote."""
    try:
        found = tomllib.loads(profile_path().read_text(encoding="utf-8")).get(key, "")
    except (OSError, ValueError, RuntimeError):  # none, unreadable, or a user without a home
        return ""
    return found if isinstance(found, str) else ""


def connection(at: str = "", identity: Path | str | None = None) -> tuple[str, Path]:
    """Where the coordinator is, and the folder of whose identity asks it: as given, else as
    $COFUSE_AT and $COFUSE_IDENTITY say, else the profile.

    Raises: ValueError when nobody has said one of them.
    """
    at = at or os.environ.get("COFUSE_AT", "") or remembered("at")
    folder = identity or os.environ.get("COFUSE_IDENTITY") or remembered("identity")
    if not at or not folder:
        raise ValueError(
            "found no address or no identity, wanted both: say `cofuse login HOST:PORT FOLDER` "
            "once, set COFUSE_AT and COFUSE_IDENTITY, or give them here"
        )
    return at, Path(folder)


def remember(at: str, identity: Path) -> Path:
    """Write the profile; return its path. Raises: OSError."""
    path = profile_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"at": at, "identity": str(identity.resolve())}
    path.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in values.items()), "utf-8")
    return path


def forget() -> bool:
    """Remove the profile; return whether there was one."""
    path = profile_path()
    there = path.is_file()
    path.unlink(missing_ok=True)
    return there
