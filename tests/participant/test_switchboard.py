"""Lines reach whom they are for, under the name of who said them, and nobody else."""

import json
import selectors
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from participant.switchboard import MAX_LINE_BYTES, Switchboard


@dataclass
class Board:
    """A switchboard turned by hand, and the far ends of what is plugged in."""

    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    ends: dict[str, socket.socket] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.board = Switchboard(self.selector)

    def plug(self, who: str) -> None:
        ours, self.ends[who] = socket.socketpair()
        self.ends[who].setblocking(False)
        self.board.plug(who, ours)

    def turn(self) -> set[str]:
        """Carry what there is; return who hung up."""
        gone = set()
        while found := self.selector.select(0):
            for key, events in found:
                if not self.board.turn(key.data, events):
                    gone.add(key.data)
                    self.board.pull(key.data)
        return gone

    def heard(self, who: str) -> list[str]:
        self.turn()
        try:
            return self.ends[who].recv(1 << 20).decode().splitlines()
        except BlockingIOError:
            return []


@pytest.fixture
def board() -> Iterator[Board]:
    made = Board()
    for who in ("guard", "trainer", "courier"):
        made.plug(who)
    for who in made.ends:
        made.heard(who)
    yield made
    for end in made.ends.values():
        end.close()
    for who in ("guard", "trainer", "courier"):
        made.board.pull(who)
    made.selector.close()


def test_a_line_arrives_under_the_name_of_who_said_it(board: Board) -> None:
    board.ends["courier"].sendall(b'guard {"say": 1}\nguard {"say"')
    assert board.heard("guard") == ['courier {"say": 1}']
    board.ends["courier"].sendall(b": 2}\n")
    assert board.heard("guard") == ['courier {"say": 2}']
    board.ends["guard"].sendall(b"trainer {}\n")
    assert board.heard("trainer") == ["guard {}"]


@pytest.mark.parametrize("line", [b"trainer {}\n", b"courier {}\n", b"supervisor {}\n", b"\xff\n"])
def test_the_courier_reaches_nobody_but_the_guard(board: Board, line: bytes) -> None:
    board.ends["courier"].sendall(line)
    assert [board.heard(who) for who in board.ends] == [[], [], []]


def test_who_comes_and_goes_is_told_to_those_it_may_speak_to(board: Board) -> None:
    board.ends["trainer"].sendall(b"guard last words\n")
    board.ends["trainer"].close()
    assert board.turn() == {"trainer"}
    said = board.heard("guard")
    assert said[0] == "trainer last words"
    assert [json.loads(line.split(" ", 1)[1]) for line in said[1:]] == [
        {"say": "lost", "body": {"who": "trainer"}}
    ]
    assert board.heard("courier") == []
    board.plug("trainer")
    assert '"here"' in board.heard("trainer")[0]
    assert '"here"' in board.heard("guard")[0]


def test_a_process_that_says_a_line_without_end_is_hung_up_on(board: Board) -> None:
    end, sent = board.ends["courier"], 0
    gone: set[str] = set()
    while not gone and sent < 2 * MAX_LINE_BYTES:
        with suppress(BlockingIOError):
            sent += end.send(b"x" * 65536)
        gone = board.turn()
    assert gone == {"courier"}


def test_what_a_process_does_not_take_waits_for_it(board: Board) -> None:
    lines = (b"trainer " + b"y" * 60_000 + b"\n") * 20  # more than a socket holds
    sent = 0
    while sent < len(lines):
        with suppress(BlockingIOError):
            sent += board.ends["guard"].send(lines[sent:])
        board.turn()
    wanted = (b"guard " + b"y" * 60_000 + b"\n") * 20
    got = b""
    while len(got) < len(wanted):
        board.turn()
        with suppress(BlockingIOError):
            got += board.ends["trainer"].recv(1 << 20)
    assert got == wanted
