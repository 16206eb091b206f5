"""`cofuse withdraw`: a member leaves the pivot, and the others' rounds are fused again."""

from typing import TYPE_CHECKING, Annotated

import typer

from cofuse.commands.connection import At, Identity, answer, connected, fail, say, tell

if TYPE_CHECKING:
    from cofuse.sdk import Coordinator


def withdraw(
    member: Annotated[str, typer.Argument(help="The participant whose part is taken out.")],
    at: At,
    identity: Identity,
    pivot: Annotated[
        str, typer.Option(help="Take it out of this one, as after a break.  [the newest]")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say which pivots hold something of it.")
    ] = False,
) -> None:
    """Publish a pivot without a member's contributions; repeat its rounds without it (operators).

    The last pivot that holds nothing of the member is published again at once. The rounds since are
    then repeated with the other participants, one after the other; each needs its approval.
    """
    from cofuse.withdrawal import WithdrawalError, Withdrawn, held_since, holding
    from cofuse.withdrawal import withdraw as take_out

    with connected(at, identity) as coordinator:
        before = [p.name for p in coordinator.pivots()]
        name = pivot or next(reversed(before), "")
        if not name:
            fail("there is no pivot yet: nothing holds anything of anybody")
        try:
            _known(coordinator, name, member)
            if dry_run:
                found = holding(coordinator.lineage(name), member)
                done = Withdrawn(found, found.newest, ())
            else:
                done = take_out(coordinator, name, member, say)
        except WithdrawalError as error:
            words = f"{error}. To go on: cofuse withdraw {member} --pivot {name}"
            fail(words, code="not_withdrawn")
        later = held_since(coordinator, member, before)
    held = done.holding
    words = f"held by: {', '.join(held.pivots) or 'no pivot of this lineage'}"
    say(f"{words}; the last without it: {held.clean}")
    for made in later:
        say(f"{made}, published meanwhile, holds it too: cofuse withdraw {member} --pivot {made}")
    if not dry_run:
        tell(done.pivot)
    answer(
        {
            "member": member,
            "held_by": list(held.pivots),
            "clean": held.clean,
            "to_repeat": [step.round_id for step in held.steps],
            "rounds": list(done.rounds),
            "pivot": done.pivot,
            "held_since": list(later),
        }
    )


def _known(coordinator: "Coordinator", pivot: str, member: str) -> None:
    """End with words when nobody has that name: a slip of the pen must not look like success."""
    from cofuse.withdrawal import holding
    from protos.errors import CofuseError

    if holding(coordinator.lineage(pivot), member).pivots:
        return
    joined = coordinator.participants()
    if member not in joined:
        names = ", ".join(joined) or "nobody"
        fail(CofuseError("unknown_name", f"found the member {member!r}, wanted one of {names}"))
