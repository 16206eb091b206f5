"""What quantisation does to one tensor, in numbers. Shapes: R, C = rows, columns of a matrix."""

import math
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fp8.formats import decode
from fp8.quantize import Quantized, dequantize, quantize
from fp8.recipe import QuantSpec

Role = Literal["input", "weight", "grad_output"]
ROLES: Final[tuple[Role, ...]] = ("input", "weight", "grad_output")

# An fp32 scale is rounded: the largest value may lie this much above code * scale and be no less.
_ROUNDING: Final = 1 + 2.0**-20


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tensor of one layer. Shares are of 1; losses are NaN where values are not finite."""

    layer: str
    role: Role
    format: str
    values: int
    nonfinite: int
    """Values that are NaN or infinite."""
    amax: float
    """Largest absolute value among the finite ones."""
    scale_min: float
    """Smallest scale of a block that is not all zeros; NaN when there is none."""
    scale_max: float
    underflow: float
    """Share of the non-zero values that become zero."""
    saturation: float
    """Share of the values that are clipped: larger than the largest code times the scale. Scales
    made from the tensor itself clip nothing; delayed ones, and the e4m3 ones of NVFP4, may."""
    sqnr_db: float
    """Signal to quantisation noise, 10 log10(sum x^2 / sum (x - q)^2); infinite without noise."""
    block_range: float
    """How far columns differ in size inside a square of block x block: the largest ratio of two
    columns' amax, zero columns apart. The kept copy of the input shares scales along rows and is
    quantised again along columns for the weight's gradient; that is free while this is small.
    The ratio of single values would not tell: between Gaussian ones it has no bound."""
    kurtosis: float
    """Fourth central moment over the variance squared; 3 for Gaussian values, more for outliers."""


class Tally:
    """Sums over all matrices of one role of one layer, which may be called more than once."""

    def __init__(self, spec: QuantSpec) -> None:
        self._spec = spec
        self._values = self._nonzero = self._nonfinite = self._flushed = self._clipped = 0
        self._amax, self._scale_min, self._scale_max = 0.0, math.inf, 0.0
        self._signal = self._noise = 0.0
        self._powers = [0.0] * 5
        self._range = 1.0

    def add(self, x_RC: Tensor, amax: Tensor | None = None) -> None:
        """Count a matrix in. amax: the value to scale by, where it is not the tensor's own."""
        x_RC = x_RC.detach()
        if x_RC.numel() == 0:
            return
        finite_RC = x_RC.isfinite()
        bad = x_RC.numel() - int(finite_RC.sum())
        self._values += x_RC.numel()
        self._nonfinite += bad
        self._amax = max(self._amax, float(torch.where(finite_RC, x_RC, 0).abs().amax()))
        if bad:  # one is enough to make its block NaN: no other number would mean anything
            return
        x_RC = x_RC.float()
        q = quantize(x_RC, self._spec, amax=amax)
        self._add_losses(x_RC, q)
        wide = x_RC.double()
        self._powers = [s + float(wide.pow(n).sum()) for n, s in enumerate(self._powers)]
        self._range = max(self._range, _column_range(x_RC.abs(), self._spec.block[1]))

    def row(self, layer: str, role: Role) -> Row:
        """Return what was counted."""
        counts = self._values > 0 and not self._nonfinite
        return Row(
            layer=layer,
            role=role,
            format=self._spec.format.name,
            values=self._values,
            nonfinite=self._nonfinite,
            amax=self._amax,
            scale_min=self._scale_min if counts and self._scale_max else math.nan,
            scale_max=self._scale_max if counts and self._scale_max else math.nan,
            underflow=self._flushed / max(1, self._nonzero) if counts else math.nan,
            saturation=self._clipped / self._values if counts else math.nan,
            sqnr_db=_decibels(self._signal, self._noise) if counts else math.nan,
            block_range=self._range if counts else math.nan,
            kurtosis=_kurtosis(self._powers) if counts else math.nan,
        )

    def _add_losses(self, x_RC: Tensor, q: Quantized) -> None:
        back_RC, codes_RC = dequantize(q), decode(q.codes, q.spec.format)[:, : x_RC.shape[1]]
        magnitude_RC = x_RC.abs()
        at_the_end_RC = codes_RC.abs() == q.spec.format.max
        self._nonzero += int((x_RC != 0).sum())
        self._flushed += int(((x_RC != 0) & (back_RC == 0)).sum())
        used = codes_RC != 0  # a block of zeros has a scale too, which says nothing
        if bool(used.any()):
            lowest, highest = torch.aminmax(back_RC[used] / codes_RC[used])
            self._scale_min = min(self._scale_min, float(lowest))
            self._scale_max = max(self._scale_max, float(highest))
        beyond_RC = at_the_end_RC & (magnitude_RC > back_RC.abs() * _ROUNDING)
        self._clipped += int(beyond_RC.sum())
        self._signal += float(x_RC.double().square().sum())
        self._noise += float((x_RC.double() - back_RC.double()).square().sum())


def _column_range(magnitude_RC: Tensor, block: int | None) -> float:
    """Return the largest ratio of two non-zero columns' amax inside a square of block x block."""
    width = block or max(magnitude_RC.shape)
    rows, columns = magnitude_RC.shape
    whole = pad(magnitude_RC, (0, -columns % width, 0, -rows % width))
    by_row = torch.unflatten(whole, 0, (-1, width)).amax(1)
    by_column = torch.unflatten(by_row, 1, (-1, width)).double()
    smallest = by_column.masked_fill(by_column == 0, math.inf).amin(-1)
    # A square of zeros has the ratio 0 / infinity.
    return max(1.0, float((by_column.amax(-1) / smallest).max()))


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise)


def _kurtosis(powers: list[float]) -> float:
    """Return the fourth standardised moment from the sums of x^0 to x^4; NaN for a constant."""
    count, *sums = powers
    m1, m2, m3, m4 = (s / count for s in sums)
    variance = m2 - m1 * m1
    if variance <= 1e-12 * m2 or variance == 0:
        return math.nan
    return (m4 - 4 * m1 * m3 + 6 * m1 * m1 * m2 - 3 * m1**4) / variance**2
