"""Weight decay: whether it can have mattered, and which way to move it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from gradwatch.collect.model import Finding, Validation
from gradwatch.collect.rows import F64
from gradwatch.collect.validations import gap_budget
from gradwatch.tools.recommend.stable import Seen
from gradwatch.tools.report.record import Record, Steps

#: Σ lr·λ below which decay cannot matter: it takes less than 1 % off a weight that no gradient holds.
CANNOT_MATTER: Final = 0.01
#: Σ lr·λ above which a weight that no gradient holds is gone: e⁻³ is 5 %.
ALL_FORGOTTEN: Final = 3.0
#: What a decay that is to be noticed takes off over a run.
NOTICED: Final = 0.1
#: A step on a logarithmic scale.
FACTOR: Final = 3.0
#: Change of the weight norm over the second half of a run from which on it moves.
MOVES: Final = 0.05
#: A validation is worse than the best one by so much.
WORSE: Final = 0.02

_PRIOR_SUM: Final = (
    "Loshchilov & Hutter 2019 (arXiv:1711.05101): decoupled decay multiplies a weight by 1 − lr·λ a step, so by "
    "exp(−Σ lr·λ) over a run"
)
_PRIOR_TIME: Final = (
    "Wang & Aitchison 2024 (arXiv:2405.13698): what counts is the time 1 / (lr·λ) over which weights average the past"
)
_PRIOR_SEARCH: Final = (
    "Smith 2018 (arXiv:1803.09820, § 4.4): look for weight decay on a logarithmic scale, by factors of about three"
)
_PRIOR_COUPLED: Final = (
    "Loshchilov & Hutter 2019 (arXiv:1711.05101): coupled to an adaptive optimizer, decay is divided by the size of "
    "past gradients with them"
)

Move = Literal["keep", "raise", "lower", "cannot matter", "decouple", "unknown"]


@dataclass(frozen=True, slots=True)
class DecayAdvice:
    """Which way to move the weight decay of one parameter group."""

    optimizer: str
    group: str
    move: Move
    #: What to try next; None where nothing is recommended.
    weight_decay: float | None
    #: What it was at the last step.
    present: float
    #: Σ lr·λ over the run, momentum counted in; None where it says nothing (coupled, adaptive).
    total: float | None
    #: 1 − exp(−Σ lr·λ): what it took off a weight that no gradient holds.
    shrinkage: float | None
    #: 1 / (lr·λ) at the median of the rate, in steps.
    timescale: float | None
    #: Weight norm at the end over that in the middle of the run.
    norm_trend: float | None
    #: Gap of the loss at the last validation, and in the middle of the run; positive where validation is worse.
    gap: float | None
    gap_before: float | None
    #: Share by which the last validation loss is above the best one.
    above_best: float | None
    reasons: tuple[str, ...]
    priors: tuple[str, ...]


def weight_decay(
    index: int, record: Record, steps: Steps, findings: Sequence[Finding], seen: Seen
) -> list[DecayAdvice]:
    """Recommend for every group that decays, and for the largest group of an optimizer of which none does."""
    optimizer = record.facts.manifest.optimizers[index]
    sizes = [_parameters(group) for group in optimizer.groups]
    names = list(steps.decays)
    decays = [any(value > 0 for value in column[np.isfinite(column)]) for column in steps.decays.values()]
    chosen = [i for i, does in enumerate(decays) if does]
    if not chosen and sizes and names:
        chosen = [max(range(min(len(sizes), len(names))), key=lambda i: sizes[i])]
    return [_advise(index, i, names[i], record, steps, findings, seen) for i in chosen]


def _advise(
    index: int, group: int, name: str, record: Record, steps: Steps, findings: Sequence[Finding], seen: Seen
) -> DecayAdvice:
    optimizer = record.facts.manifest.optimizers[index]
    known = record.facts.hyperparameters
    kind = str(known.get(f"optimizer.{optimizer.name}.decay", "unknown"))
    rates, decays = steps.rates[name][steps.taken], steps.decays[name][steps.taken]
    measured = np.isfinite(rates) & np.isfinite(decays)
    rates, decays = rates[measured], decays[measured]
    present = float(decays[-1]) if len(decays) else 0.0
    shrinks = kind == "decoupled" or optimizer.linear
    total: float | None = None
    timescale: float | None = None
    per_lambda = 0.0
    if shrinks and len(rates):
        share = len(steps) / max(len(steps), seen.last_step + 1) if seen.partial else 1.0
        pull = _momentum(known, optimizer.name) if optimizer.linear and kind != "decoupled" else 1.0
        per_lambda = pull * float(rates.sum()) / share
        total = pull * float((rates * decays).sum()) / share
        pace = pull * float(np.median(rates)) * present
        timescale = 1 / pace if pace > 0 else None
    trend = _norm_trend(record, index, group)
    judged = _Validated.of(record.validations)
    move, value, reasons, priors = _decide(
        kind, present, total, per_lambda, trend, judged, findings, shrinks, record.facts.manifest.budgets
    )
    return DecayAdvice(
        optimizer=optimizer.name,
        group=name,
        move=move,
        weight_decay=value,
        present=present,
        total=total,
        shrinkage=None if total is None else 1 - math.exp(-total),
        timescale=timescale,
        norm_trend=trend,
        gap=judged.gap,
        gap_before=judged.gap_before,
        above_best=judged.above_best,
        reasons=tuple(reasons),
        priors=tuple(priors),
    )


def _decide(
    kind: str,
    present: float,
    total: float | None,
    per_lambda: float,
    trend: float | None,
    judged: _Validated,
    findings: Sequence[Finding],
    shrinks: bool,
    budgets: object,
) -> tuple[Move, float | None, list[str], list[str]]:
    overfits, why = _overfits(judged, findings, budgets)
    noticed = _digits(NOTICED / per_lambda) if per_lambda > 0 else None
    told = [] if trend is None else [f"The weight norm is {trend:.2f} times that in the middle of the run."]
    if kind == "coupled" and not shrinks:
        if present == 0:
            reasons = ["Nothing decays here, and this optimizer would couple it to the gradient."]
        else:
            reasons = [
                "The decay is added to the gradient and divided by its root mean square with it: Σ lr·λ says nothing "
                "of what it does, and λ is not comparable between layers."
            ]
        return (
            "decouple",
            None,
            [*reasons, "AdamW decays by itself; begin there with λ of 0.01 to 0.1."],
            [_PRIOR_COUPLED],
        )
    if total is None:
        return "unknown", None, ["How this optimizer decays weights, or its learning rate, is not known."], []
    if total < CANNOT_MATTER:
        reasons = [
            f"It cannot matter: Σ lr·λ is {total:.2%}, and {CANNOT_MATTER:.0%} is the least that can be noticed."
        ]
        if overfits and noticed is not None:
            return (
                "raise",
                noticed,
                [*reasons, why, f"λ = {noticed:g} would take {NOTICED:.0%} off."],
                [
                    _PRIOR_SUM,
                    _PRIOR_SEARCH,
                ],
            )
        hint = f" To try it all the same: λ = {noticed:g} would take {NOTICED:.0%} off." if noticed is not None else ""
        return "cannot matter", None, [*reasons, f"{why}{hint}"], [_PRIOR_SUM]
    took = f"Σ lr·λ is {total:.3g}: a weight that no gradient holds loses {1 - math.exp(-total):.1%} over the run."
    if judged.last is None:
        return "unknown", None, [took, *told, "Without a validation there is nothing to judge it by."], [_PRIOR_SUM]
    if overfits and total < ALL_FORGOTTEN:
        return "raise", _digits(present * FACTOR), [took, why, *told], [_PRIOR_SEARCH, _PRIOR_TIME]
    if (
        not overfits
        and trend is not None
        and trend < 1 - MOVES
        and total > ALL_FORGOTTEN
        and _underfits(judged, findings)
    ):
        reason = (
            "The weights shrink, and training is no better than validation or has stopped: the decay holds it back."
        )
        return "lower", _digits(present / FACTOR), [took, *told, reason], [_PRIOR_TIME, _PRIOR_SEARCH]
    if overfits:
        reason = "The decay forgets all within the run already: look at data, augmentation and size before it."
        return "keep", None, [took, why, *told, reason], [_PRIOR_TIME]
    return "keep", None, [took, *told, why], [_PRIOR_SUM, _PRIOR_TIME]


def _overfits(judged: _Validated, findings: Sequence[Finding], budgets: object) -> tuple[bool, str]:
    """Whether validations ask for more regularisation, and why or why not."""
    if judged.last is None:
        return False, "No validation loss is recorded that would ask for more."
    if any(f.code == "overfitting" and f.active for f in findings):
        return True, "It overfits: the finding overfitting is active."
    rises = judged.above_best is not None and judged.above_best > WORSE
    budget = gap_budget(budgets, "loss") if isinstance(budgets, dict) else 0.1
    widens = judged.gap is not None and judged.gap_before is not None and judged.gap > judged.gap_before
    over = judged.gap is not None and judged.gap > budget
    if rises and over and widens:
        return True, (
            f"It overfits: the last validation loss is {judged.above_best:.1%} above the best, and the gap has grown "
            f"from {judged.gap_before:.1%} to {judged.gap:.1%}."
        )
    gap = "" if judged.gap is None else f", its gap to training {judged.gap:.1%}"
    return False, f"Nothing asks for more: the last validation loss is {judged.above_best:.1%} above the best{gap}."


def _underfits(judged: _Validated, findings: Sequence[Finding]) -> bool:
    codes = {f.code for f in findings if f.active}
    return bool(codes & {"underfitting", "loss-plateau", "loss-not-decreasing", "weight-collapse"}) or (
        judged.gap is not None and judged.gap <= 0
    )


@dataclass(frozen=True, slots=True)
class _Validated:
    """The validations of the loss over all data."""

    last: float | None = None
    above_best: float | None = None
    gap: float | None = None
    gap_before: float | None = None

    @classmethod
    def of(cls, validations: Sequence[Validation]) -> _Validated:
        own = [v for v in validations if not v.slice and math.isfinite(v.metrics.get("loss", math.nan))]
        if not own:
            return cls()
        losses = [v.metrics["loss"] for v in own]
        gaps = [v.gaps["loss"] for v in own if "loss" in v.gaps]
        best = min(losses)
        return cls(
            last=losses[-1],
            above_best=(losses[-1] - best) / abs(best) if best else None,
            gap=gaps[-1] if gaps else None,
            gap_before=gaps[len(gaps) // 2] if len(gaps) > 1 else None,
        )


def _norm_trend(record: Record, optimizer: int, group: int) -> float | None:
    """Weight norm of a group at the last sample over that at the sample next to the middle of the run."""
    tensors = record.tensors
    mine = [i for i, t in enumerate(tensors.tensors) if t.optimizer == optimizer and t.group == group]
    if not mine or len(tensors.sample_step) < 3:
        return None
    norms = np.sqrt(np.nansum(_filled(tensors.weight_norm[:, mine].astype(np.float64)) ** 2, axis=1))
    middle = int(np.searchsorted(tensors.sample_step, tensors.sample_step[-1] / 2))
    return float(norms[-1] / norms[middle]) if norms[middle] > 0 else None


def _filled(table: F64) -> F64:
    """Where a tensor was not part of a sample, its value of the last one that it was part of, else of the next."""
    for column in table.T:
        known = np.flatnonzero(np.isfinite(column))
        if len(known):
            at = np.maximum(np.searchsorted(known, np.arange(len(column)), side="right") - 1, 0)
            column[:] = column[known[at]]
    return table


def _momentum(known: object, name: str) -> float:
    """How much momentum makes of a step in the long run: (1 − dampening) / (1 − momentum)."""
    assert hasattr(known, "get")
    momentum, dampening = (known.get(f"optimizer.{name}.{what}", 0.0) for what in ("momentum", "dampening"))
    numbers = [
        float(v) if isinstance(v, int | float) and not isinstance(v, bool) else 0.0 for v in (momentum, dampening)
    ]
    if not 0 <= numbers[0] < 1:
        return 1.0
    return (1 - numbers[1]) / (1 - numbers[0]) if numbers[0] else 1.0


def _parameters(group: object) -> int:
    count = group.get("parameters", 0) if hasattr(group, "get") else 0
    return count if isinstance(count, int) else 0


def _digits(value: float) -> float:
    return float(f"{value:.1g}")
