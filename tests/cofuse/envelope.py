"""The envelope of --json, held against its form wherever a test reads it."""

import json
from typing import Any


def told(stdout: str) -> dict[str, Any]:
    """What the last line of stdout says: data, `ok`, and the error's message if there is one."""
    said: dict[str, Any] = json.loads(stdout.splitlines()[-1])
    assert said["schema"] == 1
    assert said.keys() <= {"schema", "ok", "data", "error"}
    assert ("error" in said) is not said["ok"]
    found = {"ok": said["ok"], **said.get("data", {})}
    if not said["ok"]:
        assert said["error"].keys() == {"code", "message", "hint", "docs"}
        found["error"] = said["error"]["message"]
    return found
