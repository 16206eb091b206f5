"""What participants ask. The caller is its certificate; the file is checked before it counts."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from coordinator.access import caller, leaf_of_caller
from coordinator.artifacts import Artifacts
from coordinator.clock import now_unix_ms
from coordinator.engine import Engine
from coordinator.limits import Rates
from coordinator.opening import Opening, Wanted
from coordinator.presence import BEAT_S, Presence, Seen
from coordinator.rounds import State
from coordinator.store import ContributionRow, Store
from protos import logs
from protos.errors import CofuseError, abort
from protos.spec import RoundSpec
from protos.v1 import fleet_pb2 as pb
from protos.v1 import fleet_pb2_grpc
from trust.anchors import is_head
from trust.ca import public_key_bytes
from trust.chain import START, Head
from trust.identity import Leaf

_LOG = logs.logger("coordinator.fleet_service")
MISSED_BEATS: Final = 3
"""An attendance ends when this many beats in a row did not come."""
ANCHOR_S: Final = 60.0
"""How late an idle participant hears of a new head of our audit chain."""
HEAD_S: Final = 1.0
ANCHORS_PER_S: Final = 0.2
ANCHORS_BURST: Final = 10.0
"""Heads of a participant's chain that are taken: each new one is written down."""
BEATS_PER_S: Final = 5.0
BEATS_BURST: Final = 100.0
MAX_WORKING: Final = 16
MAX_TEXT: Final = 40


class FleetService(fleet_pb2_grpc.FleetServicer):
    """Join, Attend and CommitContribution."""

    def __init__(
        self,
        store: Store,
        artifacts: Artifacts,
        engine: Engine,
        presence: Presence,
        opening: Opening,
        receipt: Callable[[ContributionRow], str],
        *,
        engine_advertise: str | None = None,
    ) -> None:
        """Args: opening: reads contributions. receipt: signs for one that counts."""
        self._store = store
        self._artifacts = artifacts
        self._engine = engine
        self._presence = presence
        self._opening = opening
        self._receipt = receipt
        self._joined: set[str] = set()
        self._engine_advertise = engine_advertise
        self._known_head = START
        self._head_at = float("-inf")
        self._anchors: dict[str, Head] = {}
        self._alarms: dict[str, str] = {}

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:
        """Bind the key of the caller's certificate to its node in the engine."""
        try:
            name = caller(context).name
            key = public_key_bytes(context.auth_context()["x509_pem_cert"][0])
            self._store.upsert_participant(name, self._engine.register(name, key), key)
            self._joined.add(name)
            address = self._engine_advertise or self._engine.public_address
            return pb.JoinReply(engine_address=address)
        except CofuseError as error:
            abort(context, error)

    async def Attend(
        self, requests: AsyncIterator[pb.Beat], context: Any
    ) -> AsyncIterator[pb.Summons]:
        """Keep the roll: take beats, and say what has changed for the caller."""
        leaf = leaf_of_caller(context)
        name = leaf.identity.name
        if name not in self._joined:
            self._joined |= set(await asyncio.to_thread(self._store.participants))
        if name not in self._joined:
            raise CofuseError("not_joined", f"{name!r} attends but has not joined")
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        attendance = self._presence.arrive(name, lambda: _tell(loop, news))
        beats = asyncio.create_task(self._take_beats(leaf, requests))
        told = None
        try:
            while self._presence.current(name, attendance) and not beats.done():
                news.clear()
                head = await self._head()
                call = self._presence.call(name)
                if (call, head) != told:
                    told = (call, head)
                    yield pb.Summons(
                        summoned=call.summoned,
                        ended_rounds=sorted(call.ended),
                        beat_interval_s=BEAT_S,
                        audit_seq=head.seq,
                        audit_head=head.h if head.seq else "",
                    )
                await _news_or(beats, news, ANCHOR_S)
            if beats.done():
                beats.result()
        finally:
            beats.cancel()
            self._presence.leave(name, attendance)

    async def _head(self) -> Head:
        """The head of our audit chain, at most HEAD_S old: one reading is enough for a thousand."""
        now = time.monotonic()
        if now - self._head_at >= HEAD_S:
            self._head_at = now
            with contextlib.suppress(CofuseError):  # a database that is away comes back
                self._known_head = await asyncio.to_thread(self._store.audit_head)
        return self._known_head

    async def _take_beats(self, leaf: Leaf, requests: AsyncIterator[pb.Beat]) -> None:
        """Read until the caller closes its side or falls silent."""
        name = leaf.identity.name
        silence_s, rates = BEAT_S * MISSED_BEATS, Rates(BEATS_PER_S, BEATS_BURST)
        anchors = Rates(ANCHORS_PER_S, ANCHORS_BURST)
        with contextlib.suppress(StopAsyncIteration, TimeoutError):
            while True:
                async with asyncio.timeout(silence_s):  # wait_for would make a task of each beat
                    beat = await anext(requests)
                if not rates.take(name):
                    raise CofuseError("too_many_calls", "found too many beats a second")
                # Reading rounds blocks, so it has a thread: on this loop are all that attend.
                if new := self._presence.beat(name, _seen(beat, leaf)):
                    await asyncio.to_thread(self._presence.tell_ended, name, new)
                if anchors.take(name):  # the next beat tells it again
                    await self._take_anchor(name, Head(beat.audit_seq, beat.audit_head))

    async def _take_anchor(self, name: str, head: Head) -> None:
        """Remember the head of the caller's audit chain, and raise the alarm when it went back.

        Raises: CofuseError bad_request.
        """
        if head == (0, "") or head == self._anchors.get(name):
            return
        if not is_head(*head):
            raise CofuseError("bad_request", "found no head of an audit chain in a beat")
        try:
            after = await asyncio.to_thread(self._store.take_anchor, name, head)
        except CofuseError as error:  # a full disk must not end the attendance; its next beat will
            _LOG.warning("audit.not_noted", participant=name, problem=str(error))
            return
        self._anchors[name] = head
        if after.alarm and after.alarm != self._alarms.get(name):
            self._alarms[name] = after.alarm
            _LOG.critical("audit.went_back", participant=name, problem=after.alarm)

    def CommitContribution(self, request: pb.CommitRequest, context: Any) -> pb.Receipt:
        """Have the uploaded file read whole, and count it. The receipt comes after the disk."""
        try:
            name = caller(context).uri
            row = self._store.round(request.round_id)
            owned = self._store.artifact_kinds(request.sha256).get(name)
            if owned is None or not self._artifacts.has(request.sha256):
                raise CofuseError(
                    "unknown_artifact", f"you have uploaded no file {request.sha256[:80]}"
                )
            if request.size_bytes != owned[1]:
                raise CofuseError(
                    "bad_request", f"size_bytes: found {request.size_bytes}, wanted {owned[1]}"
                )
            self._opening.check(
                self._artifacts.path(request.sha256),
                self._wanted(RoundSpec.model_validate_json(row.spec_json)),
                round_id=row.round_id,
                participant=caller(context).name,
            )
            kept = self._store.commit(
                request.round_id, caller(context).name, request.sha256, owned[1]
            )
        except CofuseError as error:
            abort(context, error)
        return pb.Receipt(
            round_id=kept.round_id,
            participant=kept.participant,
            sha256=kept.sha256,
            size_bytes=kept.size_bytes,
            committed_unix_ms=kept.committed_unix_ms,
            signed_json=self._receipt(kept),
        )

    def _wanted(self, spec: RoundSpec) -> Wanted:
        """What a round's contributions are held against."""
        weights = next(
            f.sha256 for f in self._store.pivot(spec.pivot).files if f.name == "model.safetensors"
        )
        asked = spec.public_set
        return Wanted(
            spec=spec,
            pivot_sha256=weights,
            weights=self._artifacts.path(weights),
            public_set=self._artifacts.path(asked.removeprefix("sha256:")) if asked else None,
        )


def waited_for(store: Store, round_id: str) -> frozenset[str]:
    """Participants whose work a round still takes; nobody when it is over or unknown."""
    try:
        if store.round(round_id).state is not State.COLLECTING:
            return frozenset()
    except CofuseError:
        return frozenset()
    return store.named(round_id)


async def _news_or(task: "asyncio.Task[None]", news: asyncio.Event, longest_s: float) -> None:
    """Wait for either, or until so many seconds have passed."""
    woken = asyncio.create_task(news.wait())
    try:
        await asyncio.wait({task, woken}, timeout=longest_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        woken.cancel()


def _tell(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
    # A last notice may come when the coordinator is stopping and the loop is gone.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(news.set)


def _seen(beat: pb.Beat, leaf: Leaf) -> Seen:
    """The beat, checked, of who calls under that certificate.

    Raises: CofuseError bad_request.
    """
    texts = [beat.software_version, *beat.working_rounds, *beat.awaiting_approval]
    if any(len(text) > MAX_TEXT or not text.isprintable() for text in texts):
        raise CofuseError("bad_request", f"found a text that is not {MAX_TEXT} plain characters")
    for name, rounds in (
        ("working_rounds", beat.working_rounds),
        ("awaiting_approval", beat.awaiting_approval),
    ):
        if len(rounds) > MAX_WORKING:
            raise CofuseError(
                "bad_request", f"{name}: found {len(rounds)}, wanted at most {MAX_WORKING}"
            )
    now = now_unix_ms()
    finished = max(0, now - beat.expert_age_s * 1000) if beat.expert_version else 0
    return Seen(
        software_version=beat.software_version,
        clock_skew_ms=beat.clock_unix_ms - now,
        free_disk_bytes=beat.free_disk_bytes,
        paused=beat.paused,
        expert_version=beat.expert_version,
        expert_steps=beat.expert_steps,
        expert_unix_ms=finished,
        working=frozenset(beat.working_rounds),
        seen_unix_ms=now,
        awaiting=frozenset(beat.awaiting_approval),
        certificate_ends_unix_s=leaf.ends_unix_s,
    )
