"""Questions are answered once, by whom they were asked; a peer that dies is noticed."""

import errno
import selectors
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from participant.corpus import CorpusError
from participant.engine import TaskLostError
from participant.line import Ask, Body, FailedThereError, Line, PeerLostError
from participant.switchboard import Switchboard
from protos.errors import RemoteError
from protos.retry import Stopped

WAIT_S = 60


@dataclass
class House:
    """Lines of a guard and of trainers that come and go."""

    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    lines: list[Line] = field(default_factory=list)
    heard: list[Body] = field(default_factory=list)
    lost: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.board, self.lock = Switchboard(self.selector), threading.Lock()
        self.over = False
        self.carrier = threading.Thread(target=self._carry)
        self.carrier.start()
        self.guard = self.plug("guard", {})

    def plug(self, who: str, asks: dict[tuple[str, str], Ask]) -> Line:
        ours, theirs = socket.socketpair()
        with self.lock:
            self.board.plug(who, ours)
        line = Line(theirs, lambda: None)
        says = {
            ("trainer", "word"): self.heard.append,
            ("supervisor", "lost"): lambda _: self.lost.set(),
        }
        line.start(asks, says)
        self.lines.append(line)
        return line

    def stop(self) -> None:
        for line in self.lines:
            line.close()
        self.over = True
        self.carrier.join(WAIT_S)

    def _carry(self) -> None:
        while not self.over:
            for key, events in self.selector.select(0.02):
                with self.lock:
                    if not self.board.turn(key.data, events):
                        self.board.pull(key.data)


@pytest.fixture
def house() -> Iterator[House]:
    made = House()
    yield made
    made.stop()


def raising(error: Exception) -> Ask:
    def answer(_body: Body, _halt: threading.Event) -> Body:
        raise error

    return answer


def test_an_answer_comes_back_from_whom_was_asked(house: House) -> None:
    def double(body: Body, _halt: threading.Event) -> Body:
        return {"n": 2 * body["n"]}

    trainer = house.plug("trainer", {("guard", "double"): double})
    answers = [house.guard.call("trainer", "double", {"n": n}) for n in range(3)]
    assert answers == [{"n": 0}, {"n": 2}, {"n": 4}]
    trainer.say("guard", "word", {"x": 1})
    trainer.say("guard", "nonsense", {})
    house.guard.call("trainer", "double", {"n": 1})  # it still listens
    assert house.heard == [{"x": 1}]


@pytest.mark.parametrize(
    ("raised", "arrives"),
    [
        (Stopped("halted"), Stopped),
        (CorpusError("line 3"), CorpusError),
        (TaskLostError("gone"), TaskLostError),
        (ValueError("bad"), FailedThereError),
    ],
)
def test_an_error_arrives_as_what_it_is(
    house: House, raised: Exception, arrives: type[Exception]
) -> None:
    house.plug("trainer", {("guard", "do"): raising(raised)})
    with pytest.raises(arrives, match=str(raised)):
        house.guard.call("trainer", "do")


def test_a_refusal_keeps_its_id_and_a_full_disk_its_number(house: House) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    house.plug(
        "trainer",
        {
            ("guard", "dial"): raising(RemoteError("not_allowed", "no")),
            ("guard", "write"): raising(full),
        },
    )
    with pytest.raises(RemoteError, match="no") as refused:
        house.guard.call("trainer", "dial")
    assert refused.value.error_id == "not_allowed"
    with pytest.raises(OSError, match="No space") as found:
        house.guard.call("trainer", "write")
    assert found.value.errno == errno.ENOSPC
    with pytest.raises(FailedThereError):
        house.guard.call("trainer", "nobody listens to this")


def test_a_question_to_one_that_dies_is_lost_and_the_next_waits_for_the_successor(
    house: House,
) -> None:
    asked, over = threading.Event(), threading.Event()

    def never(_body: Body, halt: threading.Event) -> Body:
        asked.set()
        assert over.wait(WAIT_S)
        return {"who": "the dead one"}

    dying = house.plug("trainer", {("guard", "do"): never})
    outcome: list[object] = []

    def ask() -> None:
        try:
            outcome.append(house.guard.call("trainer", "do"))
        except PeerLostError as error:
            outcome.append(error.peer)

    first = threading.Thread(target=ask)
    first.start()
    assert asked.wait(WAIT_S)
    dying._end.shutdown(socket.SHUT_RDWR)
    first.join(WAIT_S)
    assert outcome == ["trainer"]
    second = threading.Thread(target=ask)
    second.start()
    house.plug("trainer", {("guard", "do"): lambda _body, _halt: {"who": "the new one"}})
    second.join(WAIT_S)
    over.set()
    assert outcome == ["trainer", {"who": "the new one"}]


def test_who_asks_no_longer_stops_who_answers(house: House) -> None:
    def until_halted(_body: Body, halt: threading.Event) -> Body:
        assert halt.wait(WAIT_S)
        raise Stopped

    house.plug("trainer", {("guard", "do"): until_halted})
    with pytest.raises(Stopped):
        house.guard.call("trainer", "do", should_stop=lambda: True)
    with pytest.raises(Stopped):  # there is no courier to ask
        house.guard.call("courier", "do", should_stop=lambda: True)
