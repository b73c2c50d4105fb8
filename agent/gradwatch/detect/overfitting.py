"""``overfitting``: the validation loss has turned while the training loss goes on falling."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from gradwatch.collect.model import Finding, Validation
from gradwatch.collect.run import Observation
from gradwatch.detect.detector import budget, found, optimizer_of

CODE: Final = "overfitting"
#: Validations of which the median is compared with the best one, and in a row of which it must be above.
MEDIAN: Final = 3
IN_A_ROW: Final = 3
RISE: Final = 0.05
OF_FIRST: Final = 0.01
SIGMAS: Final = 3.0
#: Last validations that their noise is taken from; and slices.
KEPT: Final = 16
MAX_SLICES: Final = 50


class Overfitting:
    """The validation loss of a slice rises from its best while training improves.

    With *m* the median of the last three validation losses, *B* the lowest such
    median so far and *σ* the noise of a validation, overfitting when in three
    validations in a row

        m − B > max(budget (5 %) · |B|,  3 σ,  1 % of |the first validation loss|),

    and the training loss (mean since the last validation) is below what it was
    at the best, so that the gap between the two is larger. *σ* comes
    from second differences of the last 16, so that a trend does not count as
    noise: their median size × 1.4826 / √6. Three of it, since *B* is the lowest
    of many noisy medians. Over when *m* is within half of that rise.
    A gap as such is no overfitting: above 10 % it flagged 107 of 198 healthy
    runs. Source: Prechelt (1998), *Early Stopping — But When?* (generalization
    loss), with the noise of the validation itself.
    """

    codes = (CODE,)

    def __init__(self) -> None:
        self._slices: dict[str, _Slice] = {}

    def observe(self, seen: Observation) -> list[Finding]:
        return [finding for validation in seen.told.validations for finding in self._judge(seen, validation)]

    def _judge(self, seen: Observation, validation: Validation) -> list[Finding]:
        loss, training = validation.metrics.get("loss"), validation.training.get("loss")
        if loss is None or training is None or not math.isfinite(loss) or not math.isfinite(training):
            return []
        if validation.slice not in self._slices and len(self._slices) >= MAX_SLICES:
            return []
        curve = self._slices.setdefault(validation.slice, _Slice())
        curve.add(validation.step, loss, training)
        if curve.best is None:
            return []
        rise = max(budget(seen, CODE, RISE) * abs(curve.best), SIGMAS * curve.noise, OF_FIRST * abs(curve.first))
        evidence = {
            "step": validation.step,
            "metric": "loss",
            "slice": validation.slice,
            "validation": curve.middle,
            "best": curve.best,
            "best_step": curve.best_step,
            "training": training,
            "training_at_best": curve.training_at_best,
            "noise": curve.noise,
        }
        where = f" on slice {validation.slice!r}" if validation.slice else ""
        if curve.judge(rise, training):
            message = (
                f"The validation loss{where} is {curve.middle:.4g} (median of three); its best was {curve.best:.4g} at "
                f"step {curve.best_step}. The training loss fell from {curve.training_at_best:.4g} to {training:.4g}."
            )
            return [self._found(seen, validation, message, evidence, advice=self._advice(seen, curve.best_step))]
        if curve.recovered(rise):
            message = f"The validation loss{where} is {curve.middle:.4g}, near its best of {curve.best:.4g}."
            return [self._found(seen, validation, message, evidence, active=False)]
        return []

    @staticmethod
    def _found(
        seen: Observation,
        validation: Validation,
        message: str,
        evidence: dict[str, Any],
        advice: str = "",
        active: bool = True,
    ) -> Finding:
        return found(
            CODE,
            seen,
            step=validation.step,
            time=validation.time,
            message=message,
            evidence=evidence,
            advice=advice,
            active=active,
        )

    @staticmethod
    def _advice(seen: Observation, best_step: int) -> str:
        optimizer = optimizer_of(seen, 0)
        assert seen.facts is not None
        decay = seen.facts.hyperparameters.get(f"optimizer.{optimizer.name}.decay")
        regularise = (
            f"{optimizer.class_name} divides its coupled weight decay away where gradients are large: use AdamW before "
            "raising it"
            if decay == "coupled" and not optimizer.linear
            else "raise weight decay, dropout or augmentation"
        )
        return f"Take the checkpoint at step {best_step} and stop there; then get more data, or {regularise}."

    def to_state(self) -> dict[str, Any]:
        return {name: curve.to_state() for name, curve in self._slices.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self._slices = {name: _Slice.from_state(inner) for name, inner in state.items()}


class _Slice:
    """The validations of one slice."""

    def __init__(self) -> None:
        self.first = math.nan
        #: Median of the last three, the lowest such median, and what was then.
        self.middle = math.nan
        self.best: float | None = None
        self.best_step = -1
        self.training_at_best = math.nan
        self._losses: list[float] = []
        self._above = 0
        self._active = False

    def add(self, step: int, loss: float, training: float) -> None:
        if math.isnan(self.first):
            self.first = loss
        self._losses = [*self._losses, loss][-KEPT:]
        if len(self._losses) < MEDIAN:
            return
        self.middle = float(np.median(self._losses[-MEDIAN:]))
        if self.best is None or self.middle < self.best:
            self.best, self.best_step = self.middle, step
            self.training_at_best = training

    @property
    def noise(self) -> float:
        """Standard deviation of one validation loss about its trend."""
        if len(self._losses) < MEDIAN + 1:
            return 0.0
        bends = np.diff(self._losses, n=2)
        return 1.4826 * float(np.median(np.abs(bends))) / math.sqrt(6)

    def judge(self, rise: float, training: float) -> bool:
        """One more validation against the rise that counts; whether it is the one that tells."""
        assert self.best is not None
        turned = self.middle - self.best > rise
        if not (turned and training < self.training_at_best):
            self._above = 0
            return False
        self._above += 1
        if self._above < IN_A_ROW or self._active:
            return False
        self._active = True
        return True

    def recovered(self, rise: float) -> bool:
        assert self.best is not None
        if not self._active or self.middle - self.best > rise / 2:
            return False
        self._active = False
        return True

    def to_state(self) -> list[Any]:
        known = [None if math.isnan(v) else v for v in (self.first, self.middle, self.training_at_best)]
        return [known, self.best, self.best_step, self._losses, self._above, self._active]

    @classmethod
    def from_state(cls, state: list[Any]) -> _Slice:
        self = cls()
        known, self.best, self.best_step, self._losses, self._above, self._active = state
        self.first, self.middle, self.training_at_best = (math.nan if v is None else float(v) for v in known)
        return self
