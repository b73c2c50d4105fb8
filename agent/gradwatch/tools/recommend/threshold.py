"""A clip threshold from the norms that a run has measured before its clip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from gradwatch.collect.model import Finding
from gradwatch.collect.rows import F64
from gradwatch.journal.manifest import Optimizer
from gradwatch.tools.recommend import norms
from gradwatch.tools.recommend.moving import Moving, moving, two_stages
from gradwatch.tools.recommend.stable import Part, Seen, stable_part
from gradwatch.tools.report.record import Steps

#: Steps of the stable part below which no constant threshold is named.
FEWEST: Final = 500
#: Drift of the norm's scale above which there is no constant threshold to name.
MOST_DRIFT: Final = 3.0
#: Tail index below which the tail is heavy: norms of infinite variance.
HEAVY: Final = 2.0
#: Upper over lower end of an interval from which on it is called wide.
WIDE: Final = 2.0
#: Contract findings whose norms are not those that a correct loop would clip.
MEASURED_WRONGLY: Final = frozenset(
    {
        "clip-each-microbatch",
        "clip-norm-overflow",
        "clip-scaled-gradients",
        "gradients-not-cleared",
        "norm-differs-between-ranks",
    }
)

_PRIOR: Final = (
    "Pascanu, Mikolov & Bengio 2013 (arXiv:1211.5063): the threshold follows from statistics of the norm over many "
    "updates, and training is not very sensitive to it"
)
_PRIOR_HEAVY: Final = (
    "Zhang et al. 2020 (arXiv:1912.03194): where the noise has a heavy tail, clipping is what makes SGD converge; "
    "single steps decide there, and p99 rests on few of them"
)
_PRIOR_MOVING: Final = (
    "Seetharaman et al. 2020 (arXiv:2007.14469, AutoClip): clip at a percentile of the norms so far instead of at a "
    "constant"
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A threshold, and the share of steps that it would have clipped, findings included: in all, and by quarter."""

    name: str
    max_norm: float
    clip_rate: float
    by_quarter: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Clipped:
    """What the clip of the run itself did: the norms are those of the trajectory that it made."""

    max_norm: float
    clip_rate: float


@dataclass(frozen=True, slots=True)
class ClipAdvice:
    """What to clip at; ``max_norm`` is None where a constant cannot be recommended, and ``instead`` says what can."""

    optimizer: str
    seen: Seen
    max_norm: float | None
    #: What it is: p99 or p95 of the good steps; "" where nothing is recommended.
    rule: str
    #: Share of steps that are expected to be clipped at it, those of findings included.
    clip_rate: float | None
    quantiles: tuple[norms.Quantile, ...]
    #: Median norm by quarter, and the largest of them over the smallest.
    scale: tuple[float, ...]
    drift: float | None
    tail_index: float | None
    candidates: tuple[Candidate, ...]
    instead: tuple[Moving, ...]
    clipped: Clipped | None
    reasons: tuple[str, ...]
    priors: tuple[str, ...]


def clip_threshold(
    index: int,
    optimizer: Optimizer,
    steps: Steps,
    findings: Sequence[Finding],
    partial: bool,
) -> ClipAdvice:
    """Recommend a threshold for one optimizer from its pre-clip norms.

    ``max_norm`` = p99 of the good steps of the stable part, p95 where their tail is
    heavy (Hill's index below 2). None, with what can be done instead, where there are
    fewer than 500 of them, where the median norm of one quarter is more than
    three times that of another, or where a contract finding says that the norms
    themselves are wrong.
    """
    part = stable_part(steps, findings, partial, index)
    good = part.norms[part.good]
    wrong = sorted({f.code for f in findings if f.code in MEASURED_WRONGLY and f.active})
    clipped = _clipped(steps)
    known = tuple(norms.quantiles(good)) if len(good) >= norms.QUARTERS else ()
    scale = tuple(norms.medians(good)) if known else ()
    drift = norms.drift(list(scale)) if scale else None
    tail = norms.tail_index(good) if known else None
    reasons: list[str] = []
    priors: list[str] = []
    instead: list[Moving] = []
    chosen: norms.Quantile | None = None
    if wrong:
        reasons.append(f"The norms are not those that a correct loop would clip: {', '.join(wrong)}. Mend that first.")
    elif len(good) < FEWEST:
        missing = FEWEST - len(good)
        reasons.append(f"{len(good)} good steps are too few for a p99; {FEWEST} are needed, {missing} more.")
    elif drift is not None and drift > MOST_DRIFT:
        told = ", ".join(f"{value:.3g}" for value in scale)
        reasons.append(
            f"The scale of the norm drifted {drift:.2g} times (medians by quarter: {told}): a constant that is right "
            "in one quarter is wrong in another."
        )
        instead += two_stages(part)
    else:
        assert tail is not None
        percentile = 95 if tail < HEAVY else 99
        chosen = next(q for q in known if q.percentile == percentile)
        reasons += _why(chosen, tail, optimizer, len(good)) + _sick(part, rounded(chosen.value), chosen.percentile)
        priors.append(_PRIOR_HEAVY if percentile == 95 else _PRIOR)
    if chosen is None and not wrong:
        instead += moving(part)
        priors += [_PRIOR_MOVING] if instead else []
    candidates = tuple(_candidates(part, known, clipped)) if len(part.norms) else ()
    reasons += _conditions(clipped, steps)
    return ClipAdvice(
        optimizer=optimizer.name,
        seen=part.seen,
        max_norm=None if chosen is None else rounded(chosen.value),
        rule="" if chosen is None else f"p{chosen.percentile}",
        clip_rate=None if chosen is None else float((part.norms > rounded(chosen.value)).mean()),
        quantiles=known,
        scale=scale,
        drift=drift,
        tail_index=tail if tail is not None and math.isfinite(tail) else None,
        candidates=candidates,
        instead=tuple(instead),
        clipped=clipped,
        reasons=tuple(reasons),
        priors=tuple(priors),
    )


def rounded(value: float) -> float:
    """Three significant digits: no run resolves more."""
    return float(f"{value:.3g}")


def _clipped(steps: Steps) -> Clipped | None:
    thresholds = steps.threshold[np.isfinite(steps.threshold)]
    if not len(thresholds):
        return None
    taken = int(steps.taken.sum())
    rate = float(steps.clipped.sum()) / taken if taken else 0.0
    return Clipped(float(thresholds[-1]), rate)


def _candidates(part: Part, known: Sequence[norms.Quantile], clipped: Clipped | None) -> list[Candidate]:
    thresholds = [(f"p{q.percentile}", rounded(q.value)) for q in known]
    if clipped is not None and math.isfinite(clipped.max_norm):
        thresholds.append(("as it was", clipped.max_norm))
    return [Candidate(name, value, *_rates(part.norms, value)) for name, value in thresholds]


def _rates(values: F64, threshold: float) -> tuple[float, tuple[float, ...]]:
    by_quarter = tuple(
        float((quarter > threshold).mean()) if len(quarter) else 0.0 for quarter in norms.quarters(values)
    )
    return float((values > threshold).mean()), by_quarter


def _why(chosen: norms.Quantile, tail: float, optimizer: Optimizer, count: int) -> list[str]:
    width = f"{chosen.low:.3g} to {chosen.high:.3g}"
    name = optimizer.class_name or "the optimizer"
    one_in = 100 // (100 - chosen.percentile)
    reasons = [
        f"The p{chosen.percentile} of {count:,} good steps clips one of them in {one_in}, and bounds whatever comes "
        f"from a corrupt batch. 95 % interval: {width}."
    ]
    if chosen.high > WIDE * chosen.low:
        reasons.append(
            "That is wide: the largest norms come together, in a part of the run (see the clip rates by quarter)."
        )
    if chosen.percentile == 95:
        reasons.append(f"p95 and not p99, since the tail is heavy (index {tail:.2g}, below {HEAVY:g}).")
    if optimizer.linear:
        reasons.append(
            f"With {name} a clipped step is one with a smaller learning rate: a threshold that binds often slows "
            "training."
        )
    else:
        reasons.append(f"{name} takes a constant clip coefficient out again: only a clip that is rare does something.")
    return reasons


def _sick(part: Part, threshold: float, percentile: int) -> list[str]:
    """Why more steps would be clipped than the percentile says, where that is so."""
    sick = part.norms[~part.good]
    clipped = float((part.norms > threshold).mean())
    if clipped < 2 * (1 - percentile / 100) or not len(sick):
        return []
    touched = float((sick > threshold).mean())
    return [
        f"It would have clipped {clipped:.1%} of all steps: {touched:.0%} of the {len(sick):,} that findings touch "
        f"({', '.join(part.seen.findings)})."
    ]


def _conditions(clipped: Clipped | None, steps: Steps) -> list[str]:
    """On what the recommendation depends."""
    reasons = []
    if clipped is not None and clipped.clip_rate > 0:
        reasons.append(
            f"The run was clipped at {clipped.max_norm:.4g} in {clipped.clip_rate:.1%} of its steps: its norms, though "
            "measured before the clip, are conditional on it, and are lower than without where it tamed something. "
            "A staging run with max_norm=math.inf in its clip records them without."
        )
    other = steps.taken & np.isfinite(steps.threshold) & np.isfinite(steps.norm)
    other &= steps.clipped != (steps.norm > steps.threshold)
    if other.any():
        reasons.append(
            f"In {int(other.sum()):,} steps the clip compared another norm than the global one (of a part of the "
            "parameters, or of scaled gradients): the rates here are those of one clip of all parameters."
        )
    return reasons
