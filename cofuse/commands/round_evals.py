"""`cofuse round evals | diff`: how a round's pivot did, and what made two rounds differ."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cofuse.commands.connection import At, Identity, RoundId, answer, connected, fail, tell
from cofuse.output import csv_text

if TYPE_CHECKING:
    from cofuse.evals import Evals
    from cofuse.sdk import Coordinator, Round


def evals(
    round_id: RoundId,
    at: At,
    identity: Identity,
    csv: Annotated[
        bool, typer.Option("--csv", help="measure, model, domain, value, is_pivot, low, high.")
    ] = False,
) -> None:
    """Show the round's pivot and the models beside it on every domain; * is the pivot."""
    with connected(at, identity) as coordinator:
        final, found = _evals(coordinator, round_id)
    rows = [asdict(cell) for cell in found.cells()]
    if csv:
        tell(csv_text(list(rows[0]) if rows else ["measure"], [list(row.values()) for row in rows]))
    else:
        tell(found.table())
    answer({"round_id": round_id, "pivot": final.pivot_name, "row": found.pivot, "cells": rows})


def diff(first: RoundId, second: RoundId, at: At, identity: Identity) -> None:
    """Show the keys that two rounds' specs say differently, and what became of their scores."""
    with connected(at, identity) as coordinator:
        one, other = coordinator.round(first), coordinator.round(second)
        scores = [
            _evals(coordinator, found.round_id)[1] if found.state == "PUBLISHED" else None
            for found in (one, other)
        ]
    keys = _differences(_flat(one.spec.model_dump(mode="json")),
                        _flat(other.spec.model_dump(mode="json")))  # fmt: skip
    for key, (before, after) in keys.items():
        tell(f"{key}: {before!r} -> {after!r}")
    if not keys:
        tell("the specs are the same")
    moved = _moved(*scores)
    for row in moved:
        tell(
            f"{row['measure']} {row['domain']}: {row['first']:.3f} -> {row['second']:.3f} "
            f"({row['second'] - row['first']:+.3f})"
        )
    for found in (one, other):
        if found.state != "PUBLISHED":
            tell(f"{found.round_id} is {found.state}: it has no scores")
    answer({
        "first": first,
        "second": second,
        "spec": {key: list(pair) for key, pair in keys.items()},
        "scores": moved,
    })  # fmt: skip


def _evals(coordinator: "Coordinator", round_id: str) -> tuple["Round", "Evals"]:
    from cofuse.evals import Evals

    final = coordinator.round(round_id)
    if final.state != "PUBLISHED":
        fail(f"{round_id} is {final.state}: it has no pivot to evaluate", code="not_published")
    return final, Evals.of(coordinator.pivot(final.pivot_name).evals)


def _flat(values: dict[str, Any], lead: str = "") -> dict[str, Any]:
    """Nested keys with dots between them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{lead}{key}.") if isinstance(value, dict) else {lead + key: value}
    return found


def _differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    keys = [*one, *(key for key in other if key not in one)]
    pairs = {key: (one.get(key), other.get(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def _moved(one: "Evals | None", other: "Evals | None") -> list[dict[str, Any]]:
    """The pivots' own scores wherever both were measured."""
    if one is None or other is None:
        return []
    after = {(c.measure, c.domain): c.value for c in other.cells() if c.is_pivot}
    return [
        {"measure": c.measure, "domain": c.domain, "first": c.value, "second": after[place]}
        for c in one.cells()
        if c.is_pivot and (place := (c.measure, c.domain)) in after
    ]
