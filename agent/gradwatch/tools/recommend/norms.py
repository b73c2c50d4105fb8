"""What the norms of a stable part say: quantiles with their uncertainty, drift of the scale, weight of the tail."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradwatch.collect.rows import F64

PERCENTILES: Final = (50, 90, 95, 99)
QUARTERS: Final = 4
#: Resamples of the bootstrap, and the share of them that an interval holds.
RESAMPLES: Final = 400
COVERED: Final = 0.95
#: Share of the norms that is the tail, and how many at least it takes to judge it.
TAIL: Final = 0.05
_FEWEST_TAIL: Final = 20


@dataclass(frozen=True, slots=True)
class Quantile:
    """A percentile of the norm, and the interval that 95 % of the resamples lie in."""

    percentile: int
    value: float
    low: float
    high: float


def quantiles(norms: F64, seed: int = 0) -> list[Quantile]:
    """The percentiles 50, 90, 95 and 99 with intervals by the circular block bootstrap.

    Norms of neighbouring steps are alike, so single steps drawn anew would
    promise too much: blocks of neighbours are drawn, six times as long as the
    autocorrelation of the log norms lasts, at least ∛n (Politis & Romano, 1992,
    *A circular block-resampling procedure for stationary data*).
    """
    values = np.quantile(norms, np.array(PERCENTILES) / 100)
    count, length = len(norms), block_length(norms)
    random = np.random.default_rng(seed)
    within = np.arange(length)
    drawn = np.empty((RESAMPLES, len(PERCENTILES)))
    for index in range(RESAMPLES):
        starts = random.integers(0, count, -(-count // length))
        sample = norms[((starts[:, None] + within).ravel()[:count]) % count]
        drawn[index] = np.quantile(sample, np.array(PERCENTILES) / 100)
    low, high = np.quantile(drawn, ((1 - COVERED) / 2, (1 + COVERED) / 2), axis=0)
    return [
        Quantile(percentile, float(values[i]), float(low[i]), float(high[i]))
        for i, percentile in enumerate(PERCENTILES)
    ]


def block_length(norms: F64) -> int:
    """Steps that a block of the bootstrap is long: six autocorrelation times, from ∛n to n / 10."""
    count = len(norms)
    logs = np.log(norms) - np.log(norms).mean()
    shortest = math.ceil(float(count) ** (1 / 3))
    longest = max(shortest, count // 10)
    variance = float(logs @ logs)
    time: float = 0.5
    for lag in range(1, longest):
        correlation = float(logs[:-lag] @ logs[lag:]) / variance if variance > 0 else 0.0
        if correlation < 0.05:
            break
        time += correlation
    return int(min(longest, max(shortest, math.ceil(6 * time))))


def quarters(norms: F64) -> list[F64]:
    """The norms in four parts of equal length, in order."""
    return [np.asarray(part) for part in np.array_split(norms, QUARTERS)]


def medians(norms: F64) -> list[float]:
    """The norm's scale: its median, quarter by quarter."""
    return [float(np.median(part)) for part in quarters(norms)]


def drift(scale: list[float]) -> float:
    """How many times the largest quarter's median is the smallest one's."""
    return max(scale) / min(scale)


def tail_index(norms: F64) -> float:
    """Hill's estimate of the tail index α from the largest 5 %: P(norm > x) falls like x^−α.

    1/α is the mean of ln(norm / q95) over the norms above q95 (Hill, 1975, *A
    simple general approach to inference about the tail of a distribution*).
    Below 2 the variance is infinite; infinity where there are too few norms to say.
    """
    q95 = float(np.quantile(norms, 1 - TAIL))
    above = norms[norms > q95]
    if len(above) < _FEWEST_TAIL or q95 <= 0:
        return math.inf
    excess = float(np.log(above / q95).mean())
    return 1 / excess if excess > 0 else math.inf
