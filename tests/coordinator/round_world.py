"""A federation without processes: one round, a network that does what it likes, and a model.

The machine draws what happens; the model, which knows neither leases nor the table, says after
each step what must hold. The round is kept by the rules alone, or by a real store around them.
"""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coordinator.happenings import (
    Broke,
    Committed,
    Decided,
    Evaluated,
    Event,
    Fused,
    Happening,
    Heard,
    Lost,
    Reported,
    Restarted,
    Tick,
    Worked,
)
from coordinator.round_state import Deliver, Duty, Fuse, Round
from coordinator.rounds import (
    ASSIGNMENT_LEASE_MS,
    FINAL,
    FUSION_LEASE_MS,
    TRANSITIONS,
    CommitRefusedError,
    IllegalTransitionError,
    State,
    duties,
)

NOW = 1_700_000_000_000
DEADLINE_MS = 3_600_000
GRACE_MS = 30_000
NAMES = ("a", "b", "c")
Apply = Callable[[Happening, int], Round]

names = st.sampled_from(NAMES)
waits_ms = st.sampled_from((0, 1, 250, 250, 1_000, 1_000, 60_000, ASSIGNMENT_LEASE_MS, 1_500_000))


class RoundWorld(RuleBasedStateMachine):
    """Subclasses say how a round is kept: begin() returns it, apply() lets something happen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.last_tick = NOW
        self.settled = False  # nothing has happened since the last tick
        self.receipts: dict[str, str] = {}
        self.closed_with: dict[str, str] | None = None
        self.published = 0
        self.refused: set[str] = set()
        self.begun: set[Duty] = set()  # by executors of any life: an attempt is begun once, ever
        self.running: set[Duty] = set()  # what this life's executors have begun
        self.assignments: list[Deliver] = []  # on the wire, of any life
        self.workers: list[Fuse] = []  # of any life; a dying one may still speak

    def begin(self, needed: int) -> Round:
        raise NotImplementedError

    def apply(self, happening: Happening, now: int) -> Round:
        raise NotImplementedError

    @initialize(needed=st.integers(1, len(NAMES)), honest=st.integers(0, 3))
    def submit(self, needed: int, honest: int) -> None:
        """Go some of the way as one hopes for, so that every state is met early and often."""
        self.round = self.begin(needed)
        if honest >= 1:
            self.let(Decided(Event.APPROVE))
            self.tick(0)
        if honest >= 2:
            for name in NAMES[:needed]:
                assert self.let(Committed(name, name * 64, 5))
                self.receipts[name] = name * 64
        if honest >= 3:
            for name in set(NAMES) - set(self.receipts):
                self.let(Reported(name, 1, "refused", "words", "{}"))
                self.refused.add(name)
            for name in self.receipts:
                self.let(Reported(name, 1, "committed", "", "{}"))
            self.tick(0)
            assert self.round.state is State.FUSING

    def let(self, happening: Happening) -> bool:
        """Let it happen; False when the round refuses it, which must change nothing."""
        before = self.round
        self.settled = False
        try:
            self.round = self.apply(happening, self.now)
        except (IllegalTransitionError, CommitRefusedError):
            return False
        if self.round.state is not before.state:
            moves = {(s, t) for (s, _), t in TRANSITIONS.items()}
            assert (before.state, self.round.state) in moves
            if self.round.state is State.FUSING:
                self.closed_with = dict(self.receipts)
        assert before.state not in FINAL or self.round == before
        assert self.round.attempt >= before.attempt
        return True

    # what happens -----------------------------------------------------------------------

    @rule()
    def approve(self) -> None:
        self.let(Decided(Event.APPROVE))

    @precondition(lambda self: self.round.state not in FINAL)
    @rule(
        event=st.sampled_from((Event.REJECT, Event.CANCEL, Event.FAIL)), really=st.integers(0, 19)
    )
    def decide(self, event: Event, really: int) -> None:
        if really == 0:  # else most runs end at once
            self.let(Decided(event, "because"))

    @rule(wait_ms=waits_ms)
    def tick(self, wait_ms: int) -> None:
        self.now += wait_ms
        self.let(Tick())
        self.last_tick = self.now
        self.let(Tick())  # at most one more conclusion from the same time
        settled = self.round
        self.let(Tick())
        assert self.round == settled or settled.state is State.APPROVED
        self.settled = True
        self.execute()

    @rule(days=st.sampled_from((-1, 1)), really=st.integers(0, 9))
    def clock_jumps(self, days: int, really: int) -> None:
        if really == 0:
            self.now += days * 86_400_000
            self.settled = False

    @rule()
    def crash(self) -> None:
        """The process is gone: what is stored stays, what was going on does not."""
        self.running.clear()
        self.let(Restarted())
        self.execute()

    def execute(self) -> None:
        """What deliveries.py and fusions.py do: begin what is wanted and new, drop the rest."""
        wanted = duties(self.round)
        for duty in wanted - self.running:
            assert duty not in self.begun, "an attempt was begun twice"
            self.begun.add(duty)
            if isinstance(duty, Deliver):
                self.assignments.append(duty)
            else:
                self.workers.append(duty)
        self.running = set(wanted)

    @precondition(lambda self: self.assignments)
    @rule(data=st.data(), changed=st.integers(0, 9))
    def commit(self, data: st.DataObject, changed: int) -> None:
        """Any assignment that was ever sent may be worked on, twice, late and out of order."""
        duty = data.draw(st.sampled_from(self.assignments))
        name = duty.participant
        digest = (name if changed else "f") * 64
        state, had = self.round.state, self.receipts.get(name)
        taken = self.let(Committed(name, digest, 5))
        if had is not None:
            assert taken == (digest == had)
        else:
            assert taken == (state is State.COLLECTING and name not in self.refused)
        if taken:
            self.receipts[name] = digest

    @precondition(lambda self: self.assignments)
    @rule(data=st.data(), status=st.sampled_from(("committed", "refused", "failed")))
    def report(self, data: st.DataObject, status: str) -> None:
        duty = data.draw(st.sampled_from(self.assignments))
        name = duty.participant
        part = self.part(name)
        self.let(Reported(name, duty.attempt, status, "words", "{}"))
        counts = part.status == "assigned" and part.attempt == duty.attempt
        if counts and status != "committed" and self.round.state is State.COLLECTING:
            self.refused.add(name)

    @precondition(lambda self: self.assignments)
    @rule(data=st.data(), is_lost=st.booleans())
    def hear(self, data: st.DataObject, is_lost: bool) -> None:
        duty = data.draw(st.sampled_from(self.assignments))
        word = Lost(duty.participant, duty.attempt, "words") if is_lost else None
        self.let(word or Heard(duty.participant, duty.attempt))

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), word=st.sampled_from((*2 * (Worked, Fused, Evaluated), "lost", "failed")))
    def work(self, data: st.DataObject, word: Any) -> None:
        """Workers of former attempts may still speak: only the present one's word counts."""
        duty = data.draw(st.sampled_from(self.workers[-2:]))
        state, current = self.round.state, duty.attempt == self.round.attempt
        if isinstance(word, str):
            self.let(Broke(duty.attempt, word, word == "lost"))
            return
        taken = self.let(word(duty.attempt))
        if word is Evaluated:
            assert taken == (current and state is State.EVALUATING)
            self.published += taken

    # what must hold ---------------------------------------------------------------------

    def part(self, name: str) -> Any:
        return next(part for part in self.round.parts if part.participant == name)

    @invariant()
    def no_receipt_is_lost(self) -> None:
        kept = {p.participant: p.sha256 for p in self.round.parts if p.status == "committed"}
        assert kept == self.receipts

    @invariant()
    def what_is_fused_is_what_was_closed_with_and_only_once(self) -> None:
        assert self.published == (self.round.state is State.PUBLISHED)
        if self.closed_with is not None:
            assert self.closed_with == self.receipts
            assert len(self.closed_with) >= self.round.needed

    @invariant()
    def a_round_has_ended_soon_after_its_deadline(self) -> None:
        if self.last_tick >= NOW + DEADLINE_MS + GRACE_MS:
            assert self.round.state in FINAL

    @invariant()
    def every_lease_is_held_or_ends_at_the_next_tick(self) -> None:
        if not self.settled:
            return
        for part in self.round.parts:
            if self.round.state is State.COLLECTING and part.status == "assigned":
                assert self.now < part.lease_unix_ms <= self.now + ASSIGNMENT_LEASE_MS
        if self.round.state in (State.FUSING, State.EVALUATING) and self.round.lease_unix_ms:
            assert self.now < self.round.lease_unix_ms <= self.now + FUSION_LEASE_MS

    def teardown(self) -> None:
        """Whatever happened: if nothing more does, time alone ends the round."""
        if hasattr(self, "round"):
            self.now = max(self.now, NOW + DEADLINE_MS)
            self.let(Tick())
            assert self.round.state in FINAL
            assert duties(self.round) == frozenset()
