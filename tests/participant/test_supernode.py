import os
import subprocess
import sys

SCRIPT = """
import os, signal, sys
from participant.supernode import LEAVE, die_with

goodbyes, seen = [], 0
signal.signal(signal.SIGTERM, lambda *_: goodbyes.append(1))

def twice(at):
    global seen
    die_with(os.getppid())
    goodbyes.clear()
    seen = 0

    def again(frame, event, arg):
        global seen
        seen += 1
        if seen == at:
            signal.raise_signal(LEAVE)
        return again

    sys.settrace(again)
    signal.raise_signal(LEAVE)
    sys.settrace(None)
    return len(goodbyes)

steps = range(1, 41)
print({twice(at) for at in steps}, 1 < seen < len(steps))
"""


def test_it_says_goodbye_once_whenever_it_is_told_again_to_leave() -> None:
    """A dying parent's threads each send the word, at any step of what answers the first."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "{1} True"
