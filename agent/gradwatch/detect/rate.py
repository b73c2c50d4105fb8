"""``learning-rate-too-high`` and ``effective-learning-rate-low``: steps that are too large, or hardly any."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from gradwatch.collect.model import Finding
from gradwatch.detect.curve import BLOCK, error_of_median
from gradwatch.detect.curves import Moment
from gradwatch.detect.detector import budget
from gradwatch.detect.loss import PROGRESS
from gradwatch.detect.past import LEVEL_BLOCKS

_RECENT: Final = 30


class LearningRateTooHigh:
    """The loss after the rate reached a new height against the loss before it.

    The baseline is the loss before the first update, or, where the rate later
    rises to more than twice anything that was trained at before, the median of
    the last 100 losses before the rise (a warm restart returns to a rate that
    was there before, and opens nothing). Within 150 steps from there:

    - **worse**: nine in ten of the last 30 losses above 1.5 × the baseline
      (budget), or a block of ten with a median above 10 × it;
    - **no better**: behind 100 steps (and up to 300, since a dying network takes
      its time) the median of the last 50 losses still above 0.95 × the first
      loss, after an update of more than 10 % of the weights' norm;
    - **worse for good**, behind 100 and up to 300 steps, only where the rate rose
      later: the median of the last 50 losses above the baseline by 10 % of its
      size and by 5 standard errors;
    - **too large a step**: the first two sampled updates of the run each more
      than 20 % of the weights' norm (where all weights began at zero there is no
      such ratio).

    At the beginning "worse" asks for an update of more than 5 % too, where
    updates were sampled: a loss that rises while weights hardly move is no
    matter of the rate (returns that grow in a policy gradient). Losses of both
    signs, runs with several optimizers, and runs whose last validation since then
    is better by 5 % than the one before are judged by "too large a step" alone. Over when the rate
    is half of what it was. The usual size of a healthy update is 0.1 %, but an
    adaptive optimizer moves every weight by its rate at first, which for a rate
    of 0.01 and fresh weights is 10 %: so no single update above that is a finding.

    Sources: Goyal et al. (2017), *Accurate, Large Minibatch SGD* (warmup);
    Gilmer et al. (2021), *A Loss Curvature Perspective on Training Instability*
    (early instability and warmup).
    """

    code = "learning-rate-too-high"
    WORSE: Final = 1.5
    FAR_WORSE: Final = 10.0
    WITHIN: Final = 150
    NO_BETTER: Final = 0.95
    BEHIND: Final = 100
    UNTIL: Final = 300
    MOVED_SOME: Final = 0.05
    MOVED: Final = 0.1
    MOVED_MUCH: Final = 0.2
    RISE: Final = 2.0
    LASTING: Final = 0.1
    SURE: Final = 5.0

    def __init__(self) -> None:
        #: Where the present height of the rate began: steps since, Unix time, loss before, whether the run began there.
        self._steps, self._time, self._first = 0, 0.0, True
        self._before: float | None = None
        self._highest = 0.0
        self._losses: list[float] = []
        #: Level of the loss before this block.
        self._level: float | None = None
        self._active_rate: float | None = None
        self._begun = False

    def begin(self) -> None:
        """A resumed attempt stands where it stood: nothing is compared with a loss that another attempt began with."""
        self._losses, self._level = [], None
        if self._begun:
            self._before, self._steps = None, self.UNTIL + 1

    def judge(self, now: Moment) -> list[Finding]:
        block = now.block
        if not self._begun:
            self._begun, self._before = True, now.past.first
        if self._active_rate is not None:
            return self._over(now)
        self._steps += BLOCK
        if self._steps > self.WITHIN and block.rate > self.RISE * self._highest > 0:
            self._steps, self._time, self._first = BLOCK, block.time, False
            self._before, self._losses = self._level, []
        self._highest = max(self._highest, 0.0 if math.isnan(block.rate) else block.rate)
        self._losses = [*self._losses, *block.losses.tolist()][-5 * BLOCK :]
        self._level = now.past.level
        why = self._why(now)
        return self._raise(now, *why) if why else []

    def _why(self, now: Moment) -> tuple[str, dict[str, Any]] | None:
        if self._steps > self.UNTIL:
            return None
        ratios = now.past.milestones.ratios(self._time, now.block.time)
        peak = max(ratios, default=None)
        if (
            now.past.judged
            and self._before is not None
            and now.past.milestones.gain(self._time, now.block.time) <= PROGRESS
        ):
            base = self._before
            worse = base + (budget(now.seen, self.code, self.WORSE) - 1) * abs(base)
            far = base + (self.FAR_WORSE - 1) * abs(base)
            moved = not self._first or peak is None or peak > self.MOVED_SOME
            recent = np.array(self._losses[-_RECENT:])
            full = len(recent) >= _RECENT and float(np.quantile(recent, 0.1)) > worse
            if self._steps <= self.WITHIN and moved and (full or now.block.loss > far):
                return f"the loss was {now.block.loss:.4g} (median of ten steps), {base:.4g} before", _peak(peak)
            settled = len(self._losses) == 5 * BLOCK and self._steps >= self.BEHIND + 5 * BLOCK
            level = float(np.median(self._losses)) if self._losses else base
            stuck = self._first and base > 0 and level > self.NO_BETTER * base
            if self._is_lasting(now, base):
                return f"the loss was {level:.4g} (median of 50 steps), {base:.4g} before", _peak(peak)
            if settled and stuck and peak is not None and peak > self.MOVED:
                what = f"the loss was {level:.4g} (median of 50 steps), no better than {base:.4g} before, and one "
                return what + f"update moved the weights by {peak:.0%} of their norm", _peak(peak)
        if self._first and len(ratios) >= 2 and min(ratios[:2]) > self.MOVED_MUCH:
            one, two = ratios[:2]
            return f"the first sampled updates moved the weights by {one:.0%} and {two:.0%} of their norm", _peak(peak)
        return None

    def _is_lasting(self, now: Moment, base: float) -> bool:
        """Whether a rate that rose at once left the loss worse for good, beyond the noise of two medians."""
        if self._first or self._steps < self.BEHIND or len(self._losses) < 5 * BLOCK:
            return False
        # The noise is that of the losses since: those before are of another level.
        error = error_of_median(np.array(self._losses)) * math.sqrt(1 + 5 / LEVEL_BLOCKS)
        rise = float(np.median(self._losses)) - base
        return rise > max(self.LASTING * abs(base), self.SURE * error)

    def _raise(self, now: Moment, why: str, told: dict[str, Any]) -> list[Finding]:
        rate = now.block.rate
        self._active_rate = rate if rate > 0 else math.inf
        where = "the run began" if self._first else f"the rate rose above {self.RISE:g} times what it was"
        message = f"{self._steps} steps after {where}, {why}; the learning rate is {rate:.3g}."
        evidence = {
            "steps_since": self._steps,
            "loss": None if math.isnan(now.block.loss) else now.block.loss,
            "loss_before": self._before,
            "learning_rate": None if math.isnan(rate) else rate,
            **told,
        }
        return now.found(self.code, message, evidence, advice=self._advice(now))

    def _advice(self, now: Moment) -> str:
        warm = "" if now.past.warmup.since < now.block.position - BLOCK else (
            " There was no warmup: raising the rate from near zero over the first few hundred steps often is enough."
        )  # fmt: skip
        kind = (
            "With SGD, divide by 3 until it holds; a clip at the p99 of healthy norms guards the rest."
            if now.optimizer.linear
            else f"{now.optimizer.class_name or 'An adaptive optimizer'} moves every weight by about the rate, "
            "whatever the gradient, so a clip does not help: divide the rate by 10."
        )
        return f"Lower the learning rate, or warm up to it. {kind}{warm}"

    def _over(self, now: Moment) -> list[Finding]:
        rate, before = now.block.rate, self._active_rate
        if before is None or not rate <= before / 2:
            return []
        self._active_rate, self._steps = None, self.UNTIL + 1
        message = f"The learning rate is {rate:.3g}, at most half of what it was."
        return now.found(self.code, message, {"learning_rate": rate}, active=False)

    def to_state(self) -> Any:
        rate = self._active_rate
        return {
            "era": [self._steps, self._time, self._before, self._first, self._highest, self._begun],
            "losses": self._losses,
            "level": self._level,
            "active": None if rate is None else [rate if math.isfinite(rate) else None],
        }

    def restore(self, state: Any) -> None:
        self._steps, self._time, self._before, self._first, self._highest, self._begun = state["era"]
        self._losses, self._level = list(state["losses"]), state["level"]
        active = state["active"]
        self._active_rate = None if active is None else math.inf if active[0] is None else float(active[0])


class EffectiveRateLow:
    """The clip scales the steps of an SGD so far down that training stands still.

    For optimizers whose step is linear in the gradient, the effective learning
    rate is the rate times the clip coefficient. Low when over 200 steps behind
    warmup at least nine in ten were clipped, the median coefficient was below
    0.05 (budget), and the loss fell by less than 10 % of what the run started
    with; over when the median coefficient is above twice that. Adaptive
    optimizers divide a constant coefficient out again and are not judged. A clip
    that halves every step, as normalised gradient descent has it, is none.
    Source: Zhang et al. (2020), *Why Gradient Clipping Accelerates Training*
    (clipped SGD is a step of size rate × threshold / norm).
    """

    code = "effective-learning-rate-low"
    BLOCKS: Final = 20
    LOW: Final = 0.05
    CLIPPED: Final = 0.9
    FALL: Final = 0.1

    def __init__(self) -> None:
        #: (median coefficient, clipped steps, level of the loss) of the last blocks.
        self._last: list[tuple[float, int, float | None]] = []
        self._active = False

    def begin(self) -> None:
        self._last = []

    def judge(self, now: Moment) -> list[Finding]:
        block, past = now.block, now.past
        if not now.optimizer.linear or math.isnan(block.coefficient) or not past.warmup.over:
            return []
        self._last = [*self._last, (block.coefficient, block.clipped, past.level)][-self.BLOCKS :]
        if len(self._last) < self.BLOCKS:
            return []
        low = budget(now.seen, self.code, self.LOW)
        coefficient = float(np.median([item[0] for item in self._last]))
        clipped = sum(item[1] for item in self._last) / (self.BLOCKS * BLOCK)
        evidence = {
            "clip_coefficient": coefficient,
            "clip_rate": clipped,
            "learning_rate": None if math.isnan(block.rate) else block.rate,
            "effective_learning_rate": None if math.isnan(block.rate) else block.rate * coefficient,
        }
        if self._active:
            if coefficient <= 2 * low:
                return []
            self._active = False
            message = f"The median clip coefficient of the last 200 steps is {coefficient:.3g}."
            return now.found(self.code, message, evidence, active=False)
        levels = [item[2] for item in self._last if item[2] is not None]
        fall = levels[0] - levels[-1] if levels else 0.0
        learning = past.judged and past.scale is not None and fall >= self.FALL * past.scale
        if coefficient >= low or clipped < self.CLIPPED or learning:
            return []
        self._active = True
        message = (
            f"{clipped:.0%} of the last 200 steps were clipped, by a median factor of {coefficient:.3g}: with "
            f"{now.optimizer.class_name or 'SGD'} the learning rate that takes effect is "
            f"{block.rate * coefficient:.3g} of {block.rate:.3g}."
        )
        return now.found(self.code, message, evidence)

    def to_state(self) -> Any:
        return [self._last, self._active]

    def restore(self, state: Any) -> None:
        self._last = [(float(c), int(n), level) for c, n, level in state[0]]
        self._active = bool(state[1])


def _peak(ratio: float | None) -> dict[str, Any]:
    return {"peak_update_ratio": ratio}
