"""Thresholds that move, for runs for which no constant can be named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from gradwatch.collect.rows import F64
from gradwatch.tools.recommend import norms
from gradwatch.tools.recommend.stable import Part

#: Past norms that a moving percentile looks at, how many it takes to begin, and how often it is taken anew.
WINDOW: Final = 1_000
_BEGIN: Final = 100
_ANEW: Final = 10
PERCENTILE: Final = 99
#: Steps of which a stage's threshold must be the percentile.
_FEWEST: Final = 100
#: The scale of a stage may drift by this much.
_STEADY: Final = 3.0


@dataclass(frozen=True, slots=True)
class Moving:
    """A threshold that is no constant: how to set it, and the share of steps that it would have clipped."""

    kind: str
    how: str
    clip_rate: float
    by_quarter: tuple[float, ...]
    #: (first step, threshold from there on); empty for a percentile of the past.
    stages: tuple[tuple[int, float], ...] = ()


def moving(part: Part) -> list[Moving]:
    """Clip at the p99 of the last 1,000 norms: it follows the scale, and needs no former run."""
    values = np.concatenate([part.before, part.norms])
    if len(values) <= _BEGIN:
        return []
    thresholds = percentile_of_the_past(values)
    clipped = values[_BEGIN:] > thresholds[_BEGIN:]
    how = (
        f"clip at the p{PERCENTILE} of the last {WINDOW:,} pre-clip norms, from step {_BEGIN} on: "
        f"max_norm = numpy.quantile(norms[-{WINDOW}:], {PERCENTILE / 100})"
    )
    return [Moving("percentile", how, *_rates(clipped))]


def percentile_of_the_past(values: F64) -> F64:
    """At each step the p99 of up to 1,000 norms before it, taken anew every ten steps; infinite for the first 100."""
    thresholds = np.full(len(values), np.inf)
    for start in range(_BEGIN, len(values), _ANEW):
        past = values[max(0, start - WINDOW) : start]
        thresholds[start : start + _ANEW] = np.quantile(past, PERCENTILE / 100)
    return thresholds


def two_stages(part: Part) -> list[Moving]:
    """A threshold for the beginning and one for the rest, where the scale settles after its beginning.

    The boundary is the quarter of the stable part from which on the medians stay within a
    factor of three; the first threshold is the p99 of what came before it, warmup included. Nothing
    where the scale never settles.
    """
    good, steps = part.norms[part.good], part.step[part.good]
    edges = [len(chunk) for chunk in norms.quarters(good)]
    scale = norms.medians(good)
    for quarter in range(1, norms.QUARTERS):
        rest = scale[quarter:]
        if norms.drift(rest) > _STEADY:
            continue
        at = sum(edges[:quarter])
        early, late = np.concatenate([part.before, good[:at]]), good[at:]
        if len(early) < _FEWEST or len(late) < _FEWEST:
            return []
        first, then = (float(f"{np.quantile(values, PERCENTILE / 100):.3g}") for values in (early, late))
        boundary = int(steps[at])
        thresholds = np.where(part.step < boundary, first, then)
        how = (
            f"two stages: max_norm = {first:g} up to step {boundary:,}, then {then:g} "
            f"(the p{PERCENTILE} of each); in a training of another length move the boundary with the learning rate"
        )
        stages = ((0, first), (boundary, then))
        return [Moving("warmup-aware", how, *_rates(part.norms > thresholds), stages=stages)]
    return []


def _rates(clipped: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> tuple[float, tuple[float, ...]]:
    parts = np.array_split(clipped, norms.QUARTERS)
    return float(clipped.mean()), tuple(float(part.mean()) if len(part) else 0.0 for part in parts)
