"""``gradient-spike``: a gradient norm far out of its past."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from gradwatch.catalog import FINDING, Severity
from gradwatch.collect.model import Finding
from gradwatch.collect.rows import F64, Mask, Rows
from gradwatch.collect.run import Observation
from gradwatch.detect.detector import budget, found, optimizer_of
from gradwatch.journal.manifest import Optimizer

WINDOW: Final = 256
#: Accepted steps from which it looks, and below which the past is short and a spike must be plainer.
FEWEST: Final = 32
SHORT: Final = 100
#: Mean excesses above q90 that an outlier must exceed it by, and the factor above the window's maximum.
EXCESSES: Final = 12.0
ABOVE_MAX: Final = 1.5
ABOVE_SHORT_MAX: Final = 4.0
#: Outliers in a row that are no outliers but a new regime.
REGIME: Final = 20
#: Steps after which a spike is over, and for which its loss is watched.
AFTERMATH: Final = 20
#: Share by which the loss must rise over the median before the spike.
LOSS_ROSE: Final = 0.5
_LOSSES: Final = 32
_FEWEST_LOSSES: Final = 5
_LN_ABOVE_MAX: Final = math.log(ABOVE_MAX)
_LN_ABOVE_SHORT_MAX: Final = math.log(ABOVE_SHORT_MAX)
CODE: Final = "gradient-spike"


class GradientSpike:
    """Norms whose logarithm stands far above the last accepted ones.

    With *x* = ln(norm) and the last 256 accepted (finite, non-zero, no
    outlier) steps of the same optimizer, a step is an outlier when

        (x − q90) / mean(excess above q90) > 12   and   norm > 1.5 · max(window)

    where 12 is the run's budget for the code. The window needs 100 steps; with
    32 to 99 the norm must be above 4 · max(window), since so few steps say
    little of a tail. The first 32 steps are not judged. Tail excesses instead of
    a deviation, since norms of one-sample training have a long left tail.
    Outliers do not enter the window; 20 in a row are a new regime, which becomes
    the window. Severity info where the clip bounded the step and the loss did
    not follow; ticket where nothing clipped, or where within 20 steps the median
    loss stands 50 % above its median before.
    """

    codes = (CODE,)

    def __init__(self) -> None:
        self._watched: dict[int, _Optimizer] = {}

    def observe(self, seen: Observation) -> list[Finding]:
        if seen.facts is None or seen.rank != 0:
            return []
        if seen.begun:
            self._watched = {}
        rows = seen.rows.take(seen.rows.plausible & seen.rows.taken)
        findings: list[Finding] = []
        if not len(rows):
            return findings
        for optimizer in np.unique(rows.optimizer).tolist():
            own = rows.optimizer == optimizer
            watched = self._watched.setdefault(optimizer, _Optimizer())
            findings += watched.observe(seen, rows.take(own))
        return sorted(findings, key=lambda finding: finding.step)

    def to_state(self) -> dict[str, Any]:
        return {str(index): watched.to_state() for index, watched in self._watched.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self._watched = {int(index): _Optimizer.from_state(inner) for index, inner in state.items()}


def outliers(norms: F64) -> Mask:
    """Which of consecutive norms, finite and above zero, are spikes by the definition; a new regime is none."""
    past, found_ = _Optimizer(), np.zeros(len(norms), np.bool_)
    row = 0
    for index, log in enumerate(np.log(norms).tolist()):
        if past._is_outlier(log, EXCESSES):
            found_[index] = True
            row += 1
            if row == REGIME:
                found_[index + 1 - REGIME : index + 1] = False
                row = 0
            past._reject(log)
        else:
            row = 0
            past._outliers.clear()
            past._accept(log)
    return found_


class _Optimizer:
    """The accepted past of one optimizer, and the spike whose aftermath is watched."""

    def __init__(self, window: Iterable[float] = ()) -> None:
        self._window: deque[float] = deque(maxlen=WINDOW)
        #: (position, value) of what can still become the window's maximum, largest first.
        self._peaks: deque[tuple[int, float]] = deque()
        self._position = 0
        self._outliers: list[float] = []
        self._losses: deque[float] = deque(maxlen=_LOSSES)
        self._spike: _Spike | None = None
        for log in window:
            self._accept(log)

    def observe(self, seen: Observation, rows: Rows) -> list[Finding]:
        findings: list[Finding] = []
        excesses = budget(seen, CODE, EXCESSES)
        norm, loss = rows.norm, rows["loss"]
        good = np.isfinite(norm) & (norm > 0)
        logs = np.log(np.where(good, norm, 1.0)).tolist()
        for index in range(len(rows)):
            if good[index]:
                log = logs[index]
                if self._is_outlier(log, excesses):
                    if self._spike is None:
                        findings.append(self._found(seen, rows, index, log))
                    self._reject(log)
                else:
                    self._outliers.clear()
                    self._accept(log)
            if self._spike is None:
                # Losses of a spike's aftermath are no past that the next one is held against.
                if np.isfinite(loss[index]):
                    self._losses.append(float(loss[index]))
            elif self._spike.add(float(loss[index])):
                findings += self._over(seen, rows, index)
        return findings

    def _accept(self, log: float) -> None:
        self._window.append(log)
        while self._peaks and self._peaks[-1][1] <= log:
            self._peaks.pop()
        self._peaks.append((self._position, log))
        self._position += 1
        if self._peaks[0][0] < self._position - WINDOW:
            self._peaks.popleft()

    def _reject(self, log: float) -> None:
        self._outliers.append(log)
        if len(self._outliers) >= REGIME:
            regime = self._outliers
            self._window.clear()
            self._peaks.clear()
            self._outliers = []
            for value in regime:
                self._accept(value)

    def _is_outlier(self, log: float, excesses: float) -> bool:
        if len(self._window) < FEWEST:
            return False
        above = _LN_ABOVE_MAX if len(self._window) >= SHORT else _LN_ABOVE_SHORT_MAX
        if log <= self._peaks[0][1] + above:
            return False
        quantile, excess = self._tail()
        return log - quantile > excesses * excess

    def _tail(self) -> tuple[float, float]:
        """q90 of the window, and the mean excess above it."""
        window = np.array(self._window)
        quantile = float(np.quantile(window, 0.9))
        above = window[window > quantile]
        return quantile, float((above - quantile).mean()) if len(above) else 0.0

    def _found(self, seen: Observation, rows: Rows, index: int, log: float) -> Finding:
        step, clipped = int(rows.step[index]), bool(rows.clipped[index])
        median = float(np.median(self._losses)) if len(self._losses) >= _FEWEST_LOSSES else None
        self._spike = _Spike(step, clipped, median)
        largest = math.exp(self._peaks[0][1])
        message = (
            f"At step {step} the pre-clip gradient norm was {math.exp(log):.4g}, {math.exp(log) / largest:.3g} times "
            f"the largest of the {len(self._window)} steps before; "
            f"{'the clip bounded it' if clipped else 'nothing bounded it'}."
        )
        evidence = {
            "step": step,
            "optimizer": int(rows.optimizer[index]),
            "grad_norm": math.exp(log),
            "largest_before": largest,
            "q90_before": math.exp(self._tail()[0]),
            "clipped": clipped,
        }
        time = float(rows.time[index])
        severity: Severity = "info" if clipped else "ticket"
        advice = self._advice(optimizer_of(seen, int(rows.optimizer[index])), clipped)
        return found(
            CODE, seen, step=step, time=time, message=message, evidence=evidence, severity=severity, advice=advice
        )

    @staticmethod
    def _advice(optimizer: Optimizer, clipped: bool) -> str:
        if clipped:
            return FINDING[CODE].advice
        effect = (
            f"With {optimizer.class_name or 'SGD'} the step was as many times larger as the norm."
            if optimizer.linear
            else f"{optimizer.class_name or 'An adaptive optimizer'} bounds the step itself, but its second moment is "
            "inflated, and its steps are too small, for about 1 / (1 − beta2) steps."
        )
        return f"Look at the batch of that step, and clip at the p99 of the norms before. {effect}"

    def _over(self, seen: Observation, rows: Rows, index: int) -> list[Finding]:
        """The aftermath of a spike has passed: did the loss follow?"""
        spike, self._spike = self._spike, None
        assert spike is not None
        step, time = int(rows.step[index]), float(rows.time[index])
        findings = []
        evidence: dict[str, Any] = {"step": spike.step, "optimizer": int(rows.optimizer[index])}
        after = float(np.median(spike.losses)) if spike.losses else None
        rose = spike.before is not None and after is not None and after > spike.before + LOSS_ROSE * abs(spike.before)
        if spike.clipped and rose:
            message = (
                f"The gradient spike at step {spike.step} was clipped, yet the loss followed: its median over the "
                f"{AFTERMATH} steps since is {after:.4g}, before it was {spike.before:.4g}."
            )
            told = {"loss_before": spike.before, "loss_after": after}
            findings.append(
                found(CODE, seen, step=step, time=time, message=message, evidence=evidence | told, severity="ticket")
            )
        message = f"{AFTERMATH} steps have passed since the spike at step {spike.step}."
        findings.append(found(CODE, seen, step=step, time=time, message=message, evidence=evidence, active=False))
        return findings

    def to_state(self) -> dict[str, Any]:
        spike = None if self._spike is None else self._spike.to_state()
        return {
            "window": list(self._window),
            "outliers": self._outliers,
            "losses": list(self._losses),
            "spike": spike,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> _Optimizer:
        self = cls(state["window"])
        self._outliers = list(state["outliers"])
        self._losses.extend(state["losses"])
        self._spike = None if state["spike"] is None else _Spike(*state["spike"])
        return self


class _Spike:
    """A spike under watch: where it was, and the losses since."""

    def __init__(
        self, step: int, clipped: bool, before: float | None, steps: int = 0, losses: list[float] | None = None
    ) -> None:
        self.step, self.clipped, self.before = step, clipped, before
        self.steps = steps
        self.losses: list[float] = losses or []

    def add(self, loss: float) -> bool:
        """One more step, the spike's own first; whether the aftermath is over."""
        self.steps += 1
        if math.isfinite(loss):
            self.losses.append(loss)
        return self.steps > AFTERMATH

    def to_state(self) -> list[Any]:
        return [self.step, self.clipped, self.before, self.steps, self.losses]
