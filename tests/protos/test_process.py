"""A program that is told to stop stops, however often it is told; who computes gives way."""

import os
import signal
import subprocess
import sys

import pytest

from protos.process import GIVES_WAY, give_way

PROGRAM = """
import threading
from protos.process import on_stop_signal

stop = threading.Event()
on_stop_signal(stop.set)
print("ready", flush=True)
while not stop.wait(0.0005):
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_storm_of_signals_ends_a_program_and_never_wedges_it(number: signal.Signals) -> None:
    for _ in range(5):
        program = subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True
        )
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        for _ in range(50):
            program.send_signal(number)
        # While the interpreter shuts down it has no handlers any more: a late signal ends it too.
        assert program.wait(20) in (0, -number)


def test_what_gives_way_and_what_it_starts_come_after_us() -> None:
    code = "import os; input(); os.spawnlp(os.P_WAIT, 'nice', 'nice')"  # which prints its own
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    give_way(child)
    said, _ = child.communicate("\n", timeout=60)
    assert int(said) == max(GIVES_WAY, os.getpriority(os.PRIO_PROCESS, 0))
