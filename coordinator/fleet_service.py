"""What participants ask. The caller is its certificate; the file is checked before it counts."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open

from coordinator.access import caller
from coordinator.artifacts import Artifacts
from coordinator.clock import now_unix_ms
from coordinator.engine import Engine
from coordinator.limits import Rates
from coordinator.presence import BEAT_S, Presence, Seen
from coordinator.rounds import State
from coordinator.store import Store
from fusion.codec import check_asked, check_logits
from fusion.contribution import ContributionError
from fusion.delta_file import check_delta
from protos.errors import CofuseError, abort
from protos.public_sets import read_prompts
from protos.spec import RoundSpec
from protos.v1 import fleet_pb2 as pb
from protos.v1 import fleet_pb2_grpc
from trust.ca import public_key_bytes

MISSED_BEATS: Final = 3
"""An attendance ends when this many beats in a row did not come."""
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
        *,
        engine_advertise: str | None = None,
    ) -> None:
        self._store = store
        self._artifacts = artifacts
        self._engine = engine
        self._presence = presence
        self._joined: set[str] = set()
        self._engine_advertise = engine_advertise

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
        name = caller(context).name
        if name not in self._joined:
            self._joined |= set(await asyncio.to_thread(self._store.participants))
        if name not in self._joined:
            raise CofuseError("not_joined", f"{name!r} attends but has not joined")
        loop, news = asyncio.get_running_loop(), asyncio.Event()
        attendance = self._presence.arrive(name, lambda: _tell(loop, news))
        beats = asyncio.create_task(self._take_beats(name, requests))
        told = None
        try:
            while self._presence.current(name, attendance) and not beats.done():
                news.clear()
                call = self._presence.call(name)
                if call != told:
                    told = call
                    yield pb.Summons(
                        summoned=call.summoned,
                        ended_rounds=sorted(call.ended),
                        beat_interval_s=BEAT_S,
                    )
                await _news_or(beats, news)
            if beats.done():
                beats.result()
        finally:
            beats.cancel()
            self._presence.leave(name, attendance)

    async def _take_beats(self, name: str, requests: AsyncIterator[pb.Beat]) -> None:
        """Read until the caller closes its side or falls silent."""
        silence_s, rates = BEAT_S * MISSED_BEATS, Rates(BEATS_PER_S, BEATS_BURST)
        with contextlib.suppress(StopAsyncIteration, TimeoutError):
            while True:
                beat = await asyncio.wait_for(anext(requests), silence_s)
                if not rates.take(name):
                    raise CofuseError("too_many_calls", "found too many beats a second")
                self._presence.beat(name, _seen(beat))

    def CommitContribution(self, request: pb.CommitRequest, context: Any) -> pb.Receipt:
        """Validate the uploaded file whole and count it. The receipt comes after the disk."""
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
            spec = RoundSpec.model_validate_json(row.spec_json)
            self._check(self._artifacts.path(request.sha256), spec)
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
        )

    def _check(self, path: Path, spec: RoundSpec) -> None:
        """Refuse a file that is not what the round asked for."""
        try:
            if spec.kind == "logits" and spec.prompts is not None:
                prompts = spec.prompts.removeprefix("sha256:")
                texts = [text.encode() for text in read_prompts(self._artifacts.path(prompts))]
                header = check_logits(
                    path, prompts=texts, prompt_set_sha256=prompts, top_k=spec.top_k
                )
                whole = spec.ship_share == 1
                check_asked(
                    header,
                    sampler=spec.sampler,
                    draws=spec.draws,
                    share=spec.ship_share,
                    pivot_sha256="" if whole else self._weights_of(spec.pivot),
                )
            else:
                weights = self._weights_of(spec.pivot)
                shapes = _shapes(self._artifacts.path(weights))
                check_delta(path, pivot_sha256=weights, shapes=shapes)
        except ContributionError as error:
            raise CofuseError("bad_contribution", f"{error.code}: {error}".rstrip(".")) from error

    def _weights_of(self, pivot: str) -> str:
        return next(
            f.sha256 for f in self._store.pivot(pivot).files if f.name == "model.safetensors"
        )


def waited_for(store: Store, round_id: str) -> frozenset[str]:
    """Participants whose work a round still takes; nobody when it is over or unknown."""
    try:
        if store.round(round_id).state is not State.COLLECTING:
            return frozenset()
    except CofuseError:
        return frozenset()
    return store.named(round_id)


async def _news_or(task: "asyncio.Task[None]", news: asyncio.Event) -> None:
    """Wait for either."""
    woken = asyncio.create_task(news.wait())
    try:
        await asyncio.wait({task, woken}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        woken.cancel()


def _tell(loop: asyncio.AbstractEventLoop, news: asyncio.Event) -> None:
    # A last notice may come when the coordinator is stopping and the loop is gone.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(news.set)


def _seen(beat: pb.Beat) -> Seen:
    """The beat, checked.

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
    )


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(weights, framework="numpy") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
