"""What measurements of FP8 say in words: a row of a table, and what to worry about and do."""

import math
from collections.abc import Iterator, Sequence
from typing import Final

from fp8.formats import E2M1
from fp8.measure import Role, Row
from fp8.recipe import Recipe

LOST_TO_ZERO: Final = 0.02
"""Share of the non-zero values that become zero from which a warning is due. Under block scaling
about 1 % of a healthy gradient may go, each beside a neighbour 2e5 times its size."""
CLIPPED: Final = 0.001
"""Share of the values beyond the largest code from which a warning is due."""
LOWEST_SQNR_DB: Final = 20.0
"""An error of 10 %. E4M3 alone costs 2 to 4 %, 28 to 34 dB; E5M2 twice that."""
WIDEST_RANGE: Final = 5_000.0
"""At 2e2 quantising the kept copy again is free, at 2e4 the median column error is up by half, at
2e6 columns are lost (docs/fp8.md)."""


def warnings_of(rows: Sequence[Row], recipe: Recipe, role: Role) -> Iterator[str]:
    """Say in plain sentences what is wrong with a role's tensors, and what to do."""
    rows = [row for row in rows if row.role == role]
    spec = getattr(recipe, role)
    broken = [row.layer for row in rows if row.nonfinite]
    if broken:
        cause = (
            "go back to an earlier checkpoint"
            if role == "weight"
            else "lower lr or look at the batch"
        )
        yield f"{role} of {several(broken)} holds NaN or infinity: {cause}"
    remedy = "use BlockScaling(), with a scale for every 128 values"
    if spec.format is E2M1:
        remedy = "4 bits hold no more; use BlockScaling(), with 8"
    elif spec.block[1] is not None:
        remedy = "keep the layer out of FP8 with module_filter_fn"
    for what, share, limit, cure in (
        ("loses {} of its non-zero values to zero", "underflow", LOST_TO_ZERO, remedy),
        (
            "has {} of its values clipped",
            "saturation",
            CLIPPED,
            "use BlockScaling(), which scales by what is there" if recipe.history else remedy,
        ),
    ):
        over = sorted(
            (r for r in rows if getattr(r, share) > limit), key=lambda r: -getattr(r, share)
        )
        if over:
            worst = what.format(f"{getattr(over[0], share):.1%}")
            others = f", and {len(over) - 1} more over {limit:.1%}" if over[1:] else ""
            under = f"under the {recipe.name} recipe{others}"
            yield f"{role} of {over[0].layer} {worst} {under}: {cure}"
    noisy = sorted((r for r in rows if r.sqnr_db < LOWEST_SQNR_DB), key=lambda r: r.sqnr_db)
    if noisy and spec.format is not E2M1:
        yield (
            f"{role} of {several([r.layer for r in noisy])} is off by more than 10 % "
            f"(SQNR {noisy[0].sqnr_db:.1f} dB) under the {recipe.name} recipe: {remedy}"
        )
    wide = [r for r in rows if r.block_range > WIDEST_RANGE]
    if role == "input" and wide and recipe.saves_rows and spec.block[1] is not None:
        wide.sort(key=lambda r: -r.block_range)
        yield (
            f"input columns of {several([r.layer for r in wide])} differ by up to "
            f"{wide[0].block_range:.1g} in size, too much to quantise the kept copy again for the "
            "weight's gradient: use scale_format='fp32', which quantises it twice from the source"
        )


def several(names: Sequence[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def in_words(row: Row) -> dict[str, str]:
    """A row of the table, by column."""
    return {
        "layer": row.layer,
        "role": row.role,
        "SQNR dB": "none" if math.isnan(row.sqnr_db) else f"{row.sqnr_db:.1f}",
        "to zero": _percent(row.underflow),
        "clipped": _percent(row.saturation),
        "amax": f"{row.amax:.3g}" if not row.nonfinite else f"{row.nonfinite} not finite",
        "scale": f"{row.scale_min:.1e} .. {row.scale_max:.1e}",
        "range": f"{row.block_range:.3g}",
        "kurtosis": f"{row.kurtosis:.3g}",
    }


def _percent(share: float) -> str:
    if math.isnan(share):
        return "none"
    return "0" if share == 0 else f"{share:.2%}" if share >= 5e-5 else "<0.01%"
