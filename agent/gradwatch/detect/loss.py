"""``loss-spike`` and ``loss-diverging``: the training loss far above its past, for ten steps or for good."""

from __future__ import annotations

import math
from typing import Any, Final

from gradwatch.collect.model import Finding
from gradwatch.detect.curve import Reference
from gradwatch.detect.curves import Moment
from gradwatch.detect.detector import budget
from gradwatch.detect.past import given_back

#: Standard errors that a level must be above another: the lowest of a hundred levels is chance by three of them.
SURE: Final = 8.0
#: Share by which a validation must be better than an earlier one to count as progress.
PROGRESS: Final = 0.05


class LossSpike:
    """Ten steps whose median loss stands far above the past.

    With the last 256 accepted losses of the same optimizer (at least 100), a
    block of ten steps is an outlier when

        (m − q90) / mean(excess above q90) > budget (6)   and   m > median + ½ |median|
        and   m − median > 0.1 · |loss at the start|

    for its median *m*. Tail excesses, as for ``gradient-spike``, since losses of
    small batches have a long right tail; a median, since one odd batch that the
    run shrugs off is no ticket; the start, since a loss near zero multiplies
    easily and harmlessly. Jumps by design, such as those of a Q-learner with each
    new target network, stay below 5 excesses; planted ones began at 8. Outliers
    never enter the past; what comes behind 20 blocks of them in a row is no
    outlier but a new regime. A learning rate that rises by half within 100 steps
    (a warm restart) begins a new past. Over with the first block that is no
    outlier. Not judged where losses have both signs (policy gradients) or the run
    has several optimizers (adversarial losses jump by design), unless the loss
    became ten times as large. After "loss spikes" in Chowdhery et al. (2022),
    *PaLM*, § 5.1, there told by eye.
    """

    code = "loss-spike"
    FEWEST: Final = 100
    WINDOW: Final = 256
    EXCESSES: Final = 6.0
    ROSE: Final = 0.5
    OF_START: Final = 0.1
    REGIME: Final = 20
    RESTART: Final = 1.5

    def __init__(self) -> None:
        self._past = Reference(self.WINDOW)
        self._rates: list[float] = []
        self._outliers = 0
        self._since: int | None = None

    def begin(self) -> None:
        self._past.clear()
        self._rates, self._outliers = [], 0

    def judge(self, now: Moment) -> list[Finding]:
        block = now.block
        self._note_rate(block.rate)
        if math.isnan(block.loss):
            return []
        if self._is_outlier(now):
            self._outliers += 1
            if self._outliers <= self.REGIME:
                return self._raise(now) if self._since is None else []
        self._outliers = 0
        self._past.accept(block.losses)
        if self._since is None:
            return []
        since, self._since = self._since, None
        message = f"The loss is {block.loss:.4g} again, within what it was before the spike at step {since}."
        return now.found(self.code, message, {"loss": block.loss}, active=False)

    def _note_rate(self, rate: float) -> None:
        if self._rates and rate > self.RESTART * min(self._rates):
            self._past.clear()
            self._rates = []
        self._rates = [*self._rates, rate][-10:] if rate > 0 else self._rates

    def _is_outlier(self, now: Moment) -> bool:
        scale = now.past.scale
        if len(self._past) < self.FEWEST or scale is None:
            return False
        tail, loss = self._past.tail, now.block.loss
        rose = self.ROSE if now.past.judged else 9.0
        return (
            loss - tail.median > max(rose * abs(tail.median), self.OF_START * scale)
            and loss - tail.q90 > budget(now.seen, self.code, self.EXCESSES) * tail.excess
        )

    def _raise(self, now: Moment) -> list[Finding]:
        block, tail = now.block, self._past.tail
        self._since = block.first_step
        message = (
            f"From step {block.first_step} to {block.step} the median loss was {block.loss:.4g}; over the "
            f"{len(self._past)} steps before it was {tail.median:.4g}, nine in ten below {tail.q90:.4g}."
        )
        evidence = {
            "first_step": block.first_step,
            "loss": block.loss,
            "median_before": tail.median,
            "q90_before": tail.q90,
            "largest_before": tail.largest,
            "steps_before": len(self._past),
        }
        return now.found(self.code, message, evidence)

    def to_state(self) -> Any:
        return [self._past.to_state(), self._rates, self._outliers, self._since]

    def restore(self, state: Any) -> None:
        past, self._rates, self._outliers, self._since = state
        self._past.restore(past)


class LossDiverging:
    """The level of the loss went back by half of what the run had learned, and stays there.

    With the level *L* (median of the last 100 steps), the lowest level *B* so
    far and the level *S* of the run's first ten steps, diverging when for 50
    steps in a row

        L − B > budget (½) · max(S − B, |B|)   and   L − B > 8 standard errors

    For a loss that went below zero L − max(S, 0) takes the place of L − B: it
    has no natural size. Over when the level is half the way back. Warm restarts and curricula go
    back by less, a restart of cosine annealing by about a tenth. Where a
    run learned little, half of its best level counts. Not judged where losses
    have both signs, where the run has several optimizers, or where validations
    say otherwise: the last one since the best level is better by 5 % than the
    last one before, or one since the rise was half as large is no worse by 5 %.
    Then the loss is no measure of progress, as in reinforcement learning, where
    it grows with returns and values.
    """

    code = "loss-diverging"
    WAY_BACK: Final = 0.5
    LASTING: Final = 5

    def __init__(self) -> None:
        self._above = 0
        self._active = False
        #: Unix time since which half of the rise that counts is there.
        self._rising: float | None = None

    def begin(self) -> None:
        self._above, self._rising = 0, None

    def judge(self, now: Moment) -> list[Finding]:
        past = now.past
        if past.level is None or past.best is None or past.start is None:
            return []
        share, limit = given_back(past.level, past.best, past.start), budget(now.seen, self.code, self.WAY_BACK)
        sure = past.level - past.best > SURE * past.uncertainty
        if share < limit / 2:
            self._rising = None
        elif self._rising is None:
            self._rising = now.block.time
        if past.judged and sure and share > limit and not self._is_fine(now):
            self._above += 1
            if self._above < self.LASTING or self._active:
                return []
            self._active = True
            message = (
                f"The loss of the last 100 steps is {past.level:.4g}; its best was {past.best:.4g} (step "
                f"{past.best_step}), and the run began with {past.start:.4g}."
            )
            return now.found(self.code, message, self._evidence(now), advice=self._advice(now))
        self._above = 0
        if self._active and share < limit / 2:
            self._active = False
            message = f"The loss of the last 100 steps is {past.level:.4g} again; its best was {past.best:.4g}."
            return now.found(self.code, message, self._evidence(now), active=False)
        return []

    def _is_fine(self, now: Moment) -> bool:
        """Whether validations say that the model has not become worse with its loss."""
        milestones, until = now.past.milestones, now.block.time
        if milestones.gain(now.past.best_time, until) > PROGRESS:
            return True
        since = until if self._rising is None else self._rising
        return milestones.validated(since, until) and milestones.gain(since, until) > -PROGRESS

    @staticmethod
    def _evidence(now: Moment) -> dict[str, Any]:
        past = now.past
        return {"loss": past.level, "best": past.best, "best_step": past.best_step, "start": past.start}

    @staticmethod
    def _advice(now: Moment) -> str:
        end = (
            "With SGD a clip bounds each step; lower the rate, or clip at the p99 of the norms before."
            if now.optimizer.linear
            else f"With {now.optimizer.class_name or 'an adaptive optimizer'} look at the second-moment decay (beta2) "
            "too: gradients that grew suddenly take large steps until it has followed."
        )
        return (
            "Go back to a checkpoint before the rise, skip the batches of those steps, or lower the learning rate. "
            + end
        )

    def to_state(self) -> Any:
        return [self._above, self._active, self._rising]

    def restore(self, state: Any) -> None:
        self._above, self._active, self._rising = state
