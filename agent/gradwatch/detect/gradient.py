"""``gradient-exploding`` and ``saturated``: a new regime of the gradient norm, far above or far below the former."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from gradwatch.collect.model import Finding
from gradwatch.detect.curve import BLOCK, Reference
from gradwatch.detect.curves import Moment
from gradwatch.detect.detector import budget

_WINDOW: Final = 256
_FEWEST: Final = 100
#: Blocks outside the past after which they are the past: 200 steps.
_REGIME: Final = 20


class GradientExploding:
    """A regime of the gradient norm at least ten times the former.

    With the median *M* of the last 256 accepted pre-clip norms (at least 100),
    two blocks of ten steps in a row whose norms are, but for one in ten, above
    10 *M* (budget), whose medians are above twice that of any block before,
    and whose losses are above the level before. A norm that rises while the
    loss falls is a network that has begun to learn; one that returns to what it
    was before is a warm restart. Where losses say nothing (none are logged, both
    signs, several optimizers), 30 *M*. Such blocks do not enter the past, unless
    there are 20 of them in a row. Over with the first block below 3 *M*.
    Source of the factor: the issue of exploding gradients as in Pascanu, Mikolov
    & Bengio (2013), *On the difficulty of training recurrent neural networks*;
    ten is Megatron-LM's for its spiky-loss check.
    """

    code = "gradient-exploding"
    FACTOR: Final = 10.0
    BLIND_FACTOR: Final = 30.0
    LASTING: Final = 2

    def __init__(self) -> None:
        self._past = Reference(_WINDOW)
        self._highest = 0.0
        self._above: list[float] = []
        self._level: float | None = None
        self._active = False

    def begin(self) -> None:
        self._past.clear()
        self._above, self._level = [], None

    def judge(self, now: Moment) -> list[Finding]:
        block = now.block
        if math.isnan(block.norm) or len(block.norms) < BLOCK // 2:
            return []
        if len(self._past) < _FEWEST:
            return self._accept(now)
        middle = self._past.tail.median
        limit = budget(now.seen, self.code, self.FACTOR) * middle
        if not (middle > 0 and float(np.quantile(block.norms, 0.1)) > limit and block.norm > 2 * self._highest):
            over = self._active and block.norm < 0.3 * limit
            findings = self._end(now, middle) if over else []
            return findings + (self._accept(now) if block.norm < limit else [])
        self._above = [*self._above, block.norm]
        if len(self._above) >= _REGIME:
            self._past.clear()
            self._highest = max(self._highest, *self._above)
            return self._accept(now)
        if self._active or len(self._above) < self.LASTING or not self._worse(now, middle):
            return []
        self._active = True
        size = float(np.median(self._above[-self.LASTING :]))
        message = (
            f"The pre-clip gradient norm has been {size:.4g} for {len(self._above) * BLOCK} steps, {size / middle:.3g} "
            f"times the {middle:.4g} of the {len(self._past)} steps before"
            f"{'; the clip bounds the steps' if block.clipped else '; nothing bounds the steps'}."
        )
        evidence = {
            "grad_norm": size,
            "grad_norm_before": middle,
            "loss": None if math.isnan(block.loss) else block.loss,
            "loss_before": self._level,
            "clipped": block.clipped > 0,
        }
        return now.found(self.code, message, evidence, advice=self._advice(now))

    def _worse(self, now: Moment, middle: float) -> bool:
        if now.past.judged and self._level is not None and not math.isnan(now.block.loss):
            return now.block.loss > self._level
        return min(self._above[-self.LASTING :]) > self.BLIND_FACTOR * middle

    def _accept(self, now: Moment) -> list[Finding]:
        self._above = []
        self._highest = max(self._highest, now.block.norm)
        self._level = now.past.level
        self._past.accept(now.block.norms)
        return []

    def _end(self, now: Moment, middle: float) -> list[Finding]:
        self._active = False
        message = f"The gradient norm is {now.block.norm:.4g} again; before it grew it was {middle:.4g}."
        return now.found(self.code, message, {"grad_norm": now.block.norm}, active=False)

    @staticmethod
    def _advice(now: Moment) -> str:
        clipped = now.block.clipped > 0
        if now.optimizer.linear:
            bound = "The clip keeps each step of the SGD bounded" if clipped else "Clip at the p99 of the norms before"
            return (
                f"{bound}; then find the cause: the learning rate, the length of the sequences, a missing "
                "normalisation, or data that changed at that step."
            )
        name = now.optimizer.class_name or "The optimizer"
        return (
            "Find the cause: the learning rate, the length of the sequences, a missing normalisation, or data that "
            f"changed at that step. {name} divides by the size of past gradients: steps are largest while its second "
            "moment has not followed yet, which a clip or a lower beta2 shortens."
        )

    def to_state(self) -> Any:
        return [self._past.to_state(), self._highest, self._above, self._level, self._active]

    def restore(self, state: Any) -> None:
        past, self._highest, self._above, self._level, self._active = state
        self._past.restore(past)


class Saturated:
    """Gradients have nearly vanished while the loss is worse than before: the network is stuck, not done.

    With the median *M* of the last 256 accepted norms and the level of the loss
    before, over 50 steps the median norm below *M* / 30 (budget) and the median
    loss above the level by 20 % of its size (and 5 % of what the run started
    with). Norms that are exactly zero count. A norm that shrinks with the loss
    is convergence. Blocks below *M* / 10 do not enter the past, unless there are
    20 of them in a row with a loss that is not worse. Over when the norm is above
    *M* / 10. Not judged where losses have both signs or the run has several
    optimizers. Source: saturation as in Glorot & Bengio (2010), *Understanding
    the difficulty of training deep feedforward neural networks*, and dying ReLUs.
    """

    code = "saturated"
    FACTOR: Final = 30.0
    NEAR: Final = 10.0
    LASTING: Final = 5
    WORSE: Final = 0.2
    OF_START: Final = 0.05

    def __init__(self) -> None:
        self._past = Reference(_WINDOW)
        self._level: float | None = None
        #: (median norm, median loss) of the blocks that are far below the past.
        self._low: list[tuple[float, float]] = []
        self._active = False

    def begin(self) -> None:
        self._past.clear()
        self._low, self._level = [], None

    def judge(self, now: Moment) -> list[Finding]:
        block = now.block
        if math.isnan(block.norm):
            return []
        if len(self._past) < _FEWEST or block.norm >= self._past.tail.median / self.NEAR:
            return self._usual(now)
        self._low = [*self._low, (block.norm, block.loss)][-_REGIME:]
        if self._active:
            return []
        middle = self._past.tail.median
        last = self._low[-self.LASTING :]
        norm = float(np.median([item[0] for item in last]))
        losses = [item[1] for item in last if not math.isnan(item[1])]
        limit = middle / budget(now.seen, self.code, self.FACTOR)
        if len(last) < self.LASTING or norm > limit or not losses or not self._worse(now, losses):
            if len(self._low) >= _REGIME:
                self._past.clear()
                return self._usual(now)
            return []
        self._active = True
        loss = float(np.median(losses))
        message = (
            f"Over {self.LASTING * BLOCK} steps the pre-clip gradient norm was {norm:.3g}, before it was {middle:.3g}, "
            f"while the loss is {loss:.4g}, before {self._level:.4g}: the network is stuck."
        )
        evidence = {"grad_norm": norm, "grad_norm_before": middle, "loss": loss, "loss_before": self._level}
        return now.found(self.code, message, evidence)

    def _worse(self, now: Moment, losses: list[float]) -> bool:
        level, scale = self._level, now.past.scale
        if level is None or scale is None or not now.past.judged:
            return False
        return float(np.median(losses)) - level > max(self.WORSE * abs(level), self.OF_START * scale)

    def _usual(self, now: Moment) -> list[Finding]:
        self._low = []
        self._level = now.past.level
        self._past.accept(now.block.norms)
        if not self._active:
            return []
        self._active = False
        message = f"The gradient norm is {now.block.norm:.3g} again."
        return now.found(self.code, message, {"grad_norm": now.block.norm}, active=False)

    def to_state(self) -> Any:
        low = [[norm, None if math.isnan(loss) else loss] for norm, loss in self._low]
        return [self._past.to_state(), self._level, low, self._active]

    def restore(self, state: Any) -> None:
        past, self._level, low, self._active = state
        self._past.restore(past)
        self._low = [(float(norm), math.nan if loss is None else float(loss)) for norm, loss in low]
