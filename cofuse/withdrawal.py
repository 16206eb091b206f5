"""Taking a member out of the pivot: what holds its contributions, and the same rounds without it.

What was learnt cannot be unlearnt, so the last pivot that holds nothing of the member is published
again, as the newest, and each round since is repeated on top of it with the others. The signed
lineage says which rounds those are.
"""

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from cofuse.sdk import Pivot, Round
from protos.spec import RoundSpec
from trust.pivot_manifest import Manifest


class WithdrawalError(Exception):
    """A round without the member did not end in a pivot; the message says what helps."""


class Hub(Protocol):
    """What of cofuse.sdk.Coordinator a withdrawal needs."""

    def pivots(self) -> list[Pivot]: ...  # noqa: D102 - as the SDK's
    def lineage(self, name: str) -> list[Manifest]: ...  # noqa: D102
    def roll_back_pivot(self, name: str) -> Pivot: ...  # noqa: D102
    def round(self, round_id: str) -> Round: ...  # noqa: D102
    def submit(self, spec: RoundSpec, *, request_id: str) -> str: ...  # noqa: D102
    def wait(self, round_id: str) -> Round: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Holding:
    """Where a member's contributions are, in the lineage of one pivot."""

    newest: str
    """The pivot whose lineage it is."""
    pivots: tuple[str, ...]
    """Those that hold something of the member, oldest first."""
    clean: str
    """The pivot that the newest goes back to and that holds nothing of it."""
    steps: tuple[Manifest, ...]
    """The pivots made since, oldest first, whose rounds are to be repeated; none where the newest
    holds nothing of the member."""


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """What a withdrawal did."""

    holding: Holding
    pivot: str
    """The last pivot that was made, which holds nothing of the member."""
    rounds: tuple[str, ...]
    """The rounds that were repeated without it."""


def holding(line: Sequence[Manifest], member: str) -> Holding:
    """Find what of a lineage, given from the first pivot to the newest, holds a member's part.

    A pivot holds what its inputs and its parent hold; one that was rolled back to, what the pivot
    holds whose files it has again.
    """
    known = {manifest.name: manifest for manifest in line}
    held: set[str] = set()
    for manifest in line:  # parents come first
        source = manifest.restores or (manifest.parent.name if manifest.parent else "")
        mine = not manifest.restores and any(p.participant == member for p in manifest.inputs)
        if mine or source in held:
            held.add(manifest.name)
    at, steps = line[-1], list[Manifest]()
    while at.name in held:
        if at.restores:
            at = known[at.restores]
            continue
        steps.insert(0, at)
        assert at.parent is not None  # an imported pivot has no inputs
        at = known[at.parent.name]
    names = tuple(manifest.name for manifest in line if manifest.name in held)
    return Holding(newest=line[-1].name, pivots=names, clean=at.name, steps=tuple(steps))


def without(spec: RoundSpec, member: str, pivot: str) -> RoundSpec | None:
    """Return the same round without the member, from another pivot; None when nobody is left."""
    others = tuple(name for name in spec.participants if name != member)
    if not others:
        return None
    quorum = None if spec.quorum is None else min(spec.quorum, len(others))
    return spec.model_copy(update={"participants": others, "pivot": pivot, "quorum": quorum})


def withdraw(hub: Hub, name: str, member: str, tell: Callable[[str], None]) -> Withdrawn:
    """Publish a pivot that holds nothing of a member, and repeat the rounds since without it.

    The clean pivot is there at once, the others one by one, as operators approve their rounds.
    Called again for the same pivot after a break it goes on where it was.
    Args: name: of the pivot that the member is to be taken out of. tell: told of each step.
    Raises: WithdrawalError, RemoteError; and what was published by then stays.
    """
    found = holding(hub.lineage(name), member)
    if not found.steps:
        return Withdrawn(found, found.newest, ())
    pivot, made = hub.roll_back_pivot(found.steps[0].name).name, list[str]()
    tell(f"{pivot} has the files of {found.clean} again, and nothing of {member}")
    for step in found.steps:
        spec = without(hub.round(step.round_id).spec, member, pivot)
        if spec is None:
            tell(f"{step.round_id} had {member} alone: nothing of it is left to repeat")
            continue
        round_id = hub.submit(spec, request_id=_request_id(member, step, pivot))
        tell(
            f"{round_id} repeats {step.round_id} with {', '.join(spec.participants)}; another "
            f"operator lets it run with: cofuse round approve {round_id}"
        )
        final = hub.wait(round_id)
        made.append(round_id)
        if final.state != "PUBLISHED":
            raise WithdrawalError(
                f"{round_id} ended {final.state} ({final.detail or 'no reason given'}); {pivot} "
                f"holds nothing of {member} and is the newest. See cofuse why {round_id}; what is "
                f"left to repeat, oldest first: {_left(found.steps, step)}"
            )
        pivot = final.pivot_name
        tell(f"{pivot} is published")
    return Withdrawn(found, pivot, tuple(made))


def held_since(hub: Hub, member: str, before: Collection[str]) -> tuple[str, ...]:
    """Pivots that are not among `before` and hold something of a member: open rounds go on."""
    new = [pivot.name for pivot in hub.pivots() if pivot.name not in before]
    return tuple(name for name in new if name in holding(hub.lineage(name), member).pivots)


def _request_id(member: str, step: Manifest, pivot: str) -> str:
    """The same repetition has the same id, so that it is asked for once."""
    return hashlib.sha256(f"withdraw {member} {step.round_id} {pivot}".encode()).hexdigest()[:32]


def _left(steps: Sequence[Manifest], failed: Manifest) -> str:
    return ", ".join(step.round_id for step in steps[steps.index(failed) :])
