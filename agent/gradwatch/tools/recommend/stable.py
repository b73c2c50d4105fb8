"""The stable part of a run: the steps from which something can be learned about the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradwatch.collect.model import Finding
from gradwatch.collect.rows import F64, I64, Mask
from gradwatch.detect.past import Warmup
from gradwatch.detect.spike import AFTERMATH, outliers
from gradwatch.tools.report.record import Steps

#: Share of a run's steps that its beginning is.
FIRST: Final = 0.1
#: Findings of one step, which has an aftermath.
_OF_A_STEP: Final = frozenset({"gradient-spike", "nonfinite-gradient", "nonfinite-loss"})
#: Findings of a stretch of steps that ends where they are raised, and how far it reaches back at most.
_OF_A_STRETCH: Final = {
    "gradient-exploding": 40,
    "learning-rate-too-high": 150,
    "loss-diverging": 120,
    "loss-spike": 20,
    "nonfinite-weight": 100,
    "saturated": 100,
    "update-ratio-out-of-band": 100,
    "weight-collapse": 200,
}


@dataclass(frozen=True, slots=True)
class Seen:
    """Which steps a recommendation is made from.

    A journal's rings keep a bounded number of steps: ``first_step`` to
    ``last_step`` are those that could still be read. Each step counts once,
    as it was trained last. ``used`` of them make the stable part.
    """

    first_step: int
    last_step: int
    steps: int
    #: Whether steps before ``first_step`` are gone.
    partial: bool
    used: int
    #: What was set aside, and how many steps of it: "not measured", "first tenth", "warmup", "findings".
    aside: dict[str, int]
    #: Codes of the findings that steps were set aside for.
    findings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Norms of one optimizer, pre-clip and unscaled, in the order of the steps."""

    seen: Seen
    #: Behind the beginning and the warmup, findings included: what a threshold would meet.
    step: F64
    norms: F64
    #: Those of :attr:`norms` that no finding touches: what is learned from.
    good: Mask
    #: The norms before that, of the beginning and the warmup.
    before: F64


def stable_part(steps: Steps, findings: Sequence[Finding], partial: bool, optimizer: int = 0) -> Part:
    """Set aside what says nothing of a healthy step of this training.

    Aside go: steps without a finite norm; those before the learning rate has
    stopped to rise (:class:`gradwatch.detect.past.Warmup`); the first tenth of the run;
    outliers by the definition of ``gradient-spike`` and the 20 steps behind
    each, also where a finding was not kept; and the steps of other findings that
    tell of sick gradients or losses, from 20 before to 20 behind, to the end where
    they are still active.
    """
    last = _last_of_each(steps)
    order = np.flatnonzero(last)
    step, norm = steps.step[order], steps.norm[order]
    measured = steps.taken[order] & np.isfinite(norm) & (norm > 0)
    begin = int(step[0]) if len(step) and not partial else 0
    end = int(step[-1]) if len(step) else 0
    tenth = step < begin + FIRST * (end + 1 - begin)
    warming = np.arange(len(step)) < _warmup(_highest(steps)[order])
    mine = [f for f in findings if f.evidence.get("optimizer", optimizer) == optimizer]
    sick, codes = _sick(step, norm, measured, mine)
    behind = measured & ~tenth & ~warming
    aside = {
        "not measured": int((~measured).sum()),
        "first tenth": int((measured & tenth).sum()),
        "warmup": int((measured & ~tenth & warming).sum()),
        "findings": int((behind & sick).sum()),
    }
    seen = Seen(
        first_step=int(step[0]) if len(step) else -1,
        last_step=end if len(step) else -1,
        steps=len(step),
        partial=partial,
        used=int((behind & ~sick).sum()),
        aside={what: count for what, count in aside.items() if count},
        findings=codes,
    )
    return Part(seen, step[behind].astype(np.float64), norm[behind], ~sick[behind], norm[measured & ~behind])


def _last_of_each(steps: Steps) -> Mask:
    """Each step as it was trained last: without the rows that a later attempt went back over."""
    kept = np.ones(len(steps), np.bool_)
    reached = np.iinfo(np.int64).max
    for attempt in np.unique(steps.attempt)[::-1]:
        own = steps.attempt == attempt
        kept[own] = steps.step[own] < reached
        reached = min(reached, int(steps.step[own].min()))
    return kept


def _highest(steps: Steps) -> F64:
    """The highest learning rate of the parameter groups at each step; NaN where none is known."""
    if not steps.rates:
        return np.full(len(steps), np.nan)
    rates = np.stack(list(steps.rates.values()))
    highest = np.where(np.isfinite(rates), rates, -np.inf).max(axis=0)
    return np.where(np.isfinite(highest), highest, np.nan)


def _warmup(rates: F64) -> int:
    """How many steps the learning rate took to stop rising; 0 where it never rose."""
    warmup, risen = Warmup(), 0
    for index, rate in enumerate(rates.tolist()):
        before = warmup.highest
        warmup.add(rate, 1)
        if before and warmup.highest > before:
            risen = index + 1
        if warmup.over:
            break
    return risen


def _sick(step: I64, norm: F64, measured: Mask, findings: Sequence[Finding]) -> tuple[Mask, tuple[str, ...]]:
    """Steps that a finding touches, and the codes of these findings."""
    sick = np.zeros(len(step), np.bool_)
    codes: set[str] = set()
    where = np.flatnonzero(measured)
    spikes = where[outliers(norm[measured])]
    for index in spikes.tolist():
        sick[index : index + AFTERMATH + 1] = True
    if len(spikes):
        codes.add("gradient-spike")
    for finding in findings:
        if finding.code in _OF_A_STEP:
            low, high = finding.step, finding.step + AFTERMATH
        elif finding.code in _OF_A_STRETCH:
            low = finding.step - _OF_A_STRETCH[finding.code]
            high = np.iinfo(np.int64).max if finding.active else finding.step + AFTERMATH
        else:
            continue
        touched = (step >= low) & (step <= high)
        if touched.any():
            sick |= touched
            codes.add(finding.code)
    return sick, tuple(sorted(codes))
