"""``loss-not-decreasing`` and ``loss-plateau``: a training loss that has not moved, or moves no more."""

from __future__ import annotations

import math
from typing import Any, Final

from gradwatch.collect.model import Finding
from gradwatch.detect.curve import BLOCK
from gradwatch.detect.curves import Moment
from gradwatch.detect.detector import budget


class LossNotDecreasing:
    """After warmup and 500 steps more, the loss is where the run began.

    The median over the last 200 steps against that over the first 100 of the
    run: not below it by 1 % of its size (budget), nor by 3 standard errors. Over
    when it is below by 5 %. Not judged where a level of 100 steps was ever 5 %
    below the start or the loss before the first update (it has fallen, within
    those 100 steps perhaps, or its noise hides whether it has), after ``learning-rate-too-high``,
    where losses have both signs, where the run has several optimizers, where its
    first step is not in the journal (it goes on from a checkpoint), or while
    validations are better than the first one by 1 %.
    """

    code = "loss-not-decreasing"
    BEHIND_WARMUP: Final = 500
    LEAST: Final = 0.01
    OVER: Final = 0.05
    FIRST: Final = 10
    LAST: Final = 20

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: list[float] = []
        self._warm = 0
        self._active = False

    def begin(self) -> None:
        self._last, self._warm = [], 0

    def judge(self, now: Moment) -> list[Finding]:
        past, loss = now.past, now.block.loss
        self._warm += BLOCK if past.warmup.over else 0
        if math.isnan(loss):
            return []
        if len(self._first) < self.FIRST:
            self._first = [*self._first, loss]
            return []
        self._last = [*self._last, loss][-self.LAST :]
        if self._warm < self.BEHIND_WARMUP or len(self._last) < self.LAST:
            return []
        before, after = _middle(self._first), _middle(self._last)
        error = past.uncertainty * math.sqrt(1 + self.FIRST / self.LAST)
        gain, least = before - after, budget(now.seen, self.code, self.LEAST)
        evidence = {"loss": after, "loss_at_start": before, "steps_behind_warmup": self._warm}
        if self._active:
            if gain > max(self.OVER, least) * abs(before) or not past.judged:
                self._active = False
                message = f"The loss is {after:.4g}; the run began with {before:.4g}."
                return now.found(self.code, message, evidence, active=False)
            return []
        highest = max(before, before if past.first is None else past.first)
        fell = past.best is not None and highest - past.best > self.OVER * abs(highest)
        stuck = not fell and gain < least * abs(before) and gain < 3 * error
        if (
            not (stuck and past.fresh and past.judged)
            or "learning-rate-too-high" in past.troubles
            or past.milestones.gain(0.0, now.block.time) > least
        ):
            return []
        self._active = True
        message = (
            f"{self._warm} steps behind warmup the loss is {after:.4g} (median of 200 steps); the run began with "
            f"{before:.4g}."
        )
        return now.found(self.code, message, evidence, advice=self._advice(now))

    @staticmethod
    def _advice(now: Moment) -> str:
        rate = now.block.rate
        clipped = now.block.clipped == BLOCK
        if clipped and now.optimizer.linear:
            return (
                "Every step is clipped, and with SGD that scales the learning rate: compare the threshold with the "
                "norms before anything else."
            )
        return (
            f"See whether gradients reach the weights (update ratios, gradients-missing), whether labels fit inputs, "
            f"and whether the rate{'' if math.isnan(rate) else f' ({rate:.3g})'} is large enough to move anything: "
            "overfitting ten samples on purpose tells code from data."
        )

    def to_state(self) -> Any:
        return [self._first, self._last, self._warm, self._active]

    def restore(self, state: Any) -> None:
        self._first, self._last, self._warm, self._active = state


class LossPlateau:
    """No better level of the loss for half of the run so far, and at least 1,000 steps.

    Better means by 1 % (budget) of what was learned, or of the level where
    that is more. Information: the end of a healthy training looks the same.
    Over with the next better level. Judged where ``loss-diverging`` is.
    """

    code = "loss-plateau"
    FEWEST: Final = 1000
    BETTER: Final = 0.01

    def __init__(self) -> None:
        self._best: float | None = None
        self._at = self._steps = 0
        self._active = False

    def begin(self) -> None:
        """It counts the run's steps, whatever the attempt."""

    def judge(self, now: Moment) -> list[Finding]:
        past = now.past
        self._steps += BLOCK
        if past.level is None or past.start is None:
            return []
        least = budget(now.seen, self.code, self.BETTER) * max(abs(past.start - past.level), abs(past.level))
        if self._best is None or past.level < self._best - least:
            self._best, self._at = past.level, self._steps
            if self._active:
                self._active = False
                message = f"The loss fell to {past.level:.4g}."
                return now.found(self.code, message, {"loss": past.level}, active=False)
            return []
        since = self._steps - self._at
        if self._active or not past.judged or since < max(self.FEWEST, self._steps // 2):
            return []
        self._active = True
        message = f"The loss has not been better for {since} of {self._steps} steps; it is {past.level:.4g}."
        evidence = {"loss": past.level, "best": self._best, "steps_since_best": since}
        return now.found(self.code, message, evidence)

    def to_state(self) -> Any:
        return [self._best, self._at, self._steps, self._active]

    def restore(self, state: Any) -> None:
        self._best, self._at, self._steps, self._active = state


def _middle(values: list[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
