"""What is known of an optimizer's past that more than one detector asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from gradwatch.collect.model import LayerTable, Validation
from gradwatch.collect.validations import is_better_high
from gradwatch.detect.curve import BLOCK, Block, Reference

#: Blocks whose median is the level of the loss: 100 steps.
LEVEL_BLOCKS: Final = 10
#: Of them so many must hold a loss.
_FEWEST_LEVELS: Final = 5
#: Last losses whose spread says how much a single one means.
_LOSSES: Final = 256
#: Share of losses on either side of zero at which they are a surrogate, not a measure of progress.
_BOTH_SIGNS: Final = 0.05
#: Samples and validations of the past that are kept.
_KEPT: Final = 32
_SMALLEST: Final = 1e-300


@dataclass(slots=True)
class Warmup:
    """When the learning rate has stopped to rise.

    Over once no rate of the attempt was above the highest one before it, by
    more than 0.1 %, for 50 steps (so a linear warmup of up to 50,000 steps is
    seen to its end); where no rate is known, after 50 steps. A later rise, such
    as a cycle's within what was reached before, does not begin it anew.
    """

    #: Highest rate so far, and steps since it was exceeded.
    highest: float = 0.0
    since: int = 0
    over: bool = False

    SETTLED: Final = 50

    def add(self, rate: float, steps: int) -> None:
        """So many steps, the last of them at this rate."""
        if rate > 1.001 * self.highest:
            self.highest, self.since = rate, 0
        else:
            self.since += steps
        self.over = self.over or self.since >= self.SETTLED


def given_back(level: float, best: float, start: float) -> float:
    """How much of what was learned a loss has given back: 0 at its best level, 1 where the run started.

    (level − best) / max(start − best, |best|): where a run learned little, its best level counts. A loss
    that went below zero is measured from where the run started, or from zero where it started below: it has no natural
    size, and that of a policy gradient returns to zero when there is nothing more to gain.
    """
    return (level - (max(start, 0.0) if best < 0 else best)) / max(start - best, abs(best), _SMALLEST)


class Milestones:
    """What comes between the steps of a run: samples of its weights, and validations.

    They may be read before the rows that were written before them, so whoever
    asks says up to when.
    """

    def __init__(self) -> None:
        #: (time, update ratio of all tensors together) of the last samples.
        self._ratios: list[tuple[float, float]] = []
        #: (time, metrics) of the last validations over all data, the first one of all in front.
        self._validations: list[tuple[float, dict[str, float]]] = []

    def sample(self, table: LayerTable) -> None:
        """Note the update ratio ‖Δw‖ / ‖w‖ over all tensors of which both are known; 0 where all weights are 0."""
        weight, ratio = np.array(table.weight_norm, dtype=float), np.array(table.update_ratio, dtype=float)
        known = np.isfinite(weight) & np.isfinite(ratio)
        total = float(np.linalg.norm(weight[known]))
        moved = float(np.linalg.norm(weight[known] * ratio[known]))
        ratio_of_all = moved / total if total > 0 else 0.0
        if math.isfinite(ratio_of_all):
            self._ratios.append((table.time, ratio_of_all))

    def validate(self, validation: Validation) -> None:
        """Note a validation over all data."""
        metrics = {name: value for name, value in validation.metrics.items() if math.isfinite(value)}
        if not validation.slice and metrics:
            self._validations.append((validation.time, metrics))

    def forget(self, before: float) -> None:
        """Of what was before a time, the last few are enough; what is still to come stays."""
        for known, first in ((self._ratios, 0), (self._validations, 1)):
            gone = sum(time < before for time, _ in known) - _KEPT - first
            if gone > 0:
                del known[first : first + gone]

    def validated(self, since: float, until: float) -> bool:
        """Whether there was a validation between two times."""
        return any(since <= time < until for time, _ in self._validations)

    def gain(self, since: float, until: float) -> float:
        """Share by which the last validation between two times is better than the last one before (the first of all
        where there is none), in the metric that gained most; 0 where there is nothing to compare."""
        between = [metrics for time, metrics in self._validations if since <= time < until]
        earlier = [metrics for time, metrics in self._validations if time < min(since, until)]
        if not between or (not earlier and len(between) < 2):
            return 0.0
        before, now = earlier[-1] if earlier else between[0], between[-1]
        gains = [
            (now[name] - value if is_better_high(name, {}) else value - now[name]) / abs(value)
            for name, value in before.items()
            if name in now and value
        ]
        return max(gains, default=0.0)

    def ratios(self, since: float, until: float) -> list[float]:
        """The update ratios sampled from one time up to before another."""
        return [ratio for time, ratio in self._ratios if since <= time < until]

    def to_state(self) -> dict[str, Any]:
        return {"ratios": self._ratios, "validations": self._validations}

    def restore(self, state: dict[str, Any]) -> None:
        self._ratios = [(float(time), float(ratio)) for time, ratio in state["ratios"]]
        self._validations = [(float(time), dict(metrics)) for time, metrics in state["validations"]]


@dataclass(slots=True)
class Past:
    """The past of one optimizer, block after block.

    ``fresh`` says whether its first step is in the journal: not where the ring no
    longer reaches back, nor in a run that goes on from another one's checkpoint.
    ``first`` is the loss of that step, computed before the weights moved; None
    where it is not known. ``start`` is the level of the loss over the first ten steps.
    ``level`` is the median over the last 100 steps, ``best`` the lowest level.
    """

    #: Whether the run has no other optimizer: losses of two measure each other, not progress.
    alone: bool = True
    fresh: bool | None = None
    first: float | None = None
    start: float | None = None
    level: float | None = None
    best: float | None = None
    best_step: int = -1
    best_time: float = 0.0
    #: Codes of the findings on this optimizer's curves that are active now.
    troubles: set[str] = field(default_factory=set)
    warmup: Warmup = field(default_factory=Warmup)
    losses: Reference = field(default_factory=lambda: Reference(_LOSSES))
    #: Medians of the last blocks.
    recent: list[float] = field(default_factory=list)
    milestones: Milestones = field(default_factory=Milestones)

    # -- what comes in

    def begin(self) -> None:
        """A new attempt: it warms up anew, and goes on from a checkpoint that may be older than the last level."""
        self.warmup = Warmup()
        self.recent, self.level = [], None
        self.losses.clear()

    def see_first(self, step: int, loss: float) -> None:
        """The first step of what came; only the first call counts."""
        if self.fresh is None:
            self.fresh = step <= 1
            self.first = loss if self.fresh and math.isfinite(loss) else None

    def add(self, block: Block) -> None:
        self.warmup.add(block.rate, BLOCK)
        self.recent = [*self.recent, block.loss][-LEVEL_BLOCKS:]
        if len(block.losses):
            self.losses.accept(block.losses)
            if self.start is None:
                self.start = block.loss
        known = [value for value in self.recent if not math.isnan(value)]
        self.level = float(np.median(known)) if len(known) >= _FEWEST_LEVELS else None
        if self.level is not None and (self.best is None or self.level < self.best):
            self.best, self.best_step, self.best_time = self.level, block.step, block.time

    # -- what follows

    @property
    def surrogate(self) -> bool:
        """Whether recent losses have both signs: a policy gradient's, whose value says nothing of progress."""
        if not len(self.losses):
            return False
        negative = self.losses.negative
        return _BOTH_SIGNS < negative < 1 - _BOTH_SIGNS

    @property
    def judged(self) -> bool:
        """Whether a level of the loss means progress here."""
        return self.alone and not self.surrogate

    @property
    def scale(self) -> float | None:
        """What a change of the loss is measured by: the size of the level that the run started with."""
        return None if self.start is None else abs(self.start)

    @property
    def uncertainty(self) -> float:
        """Standard error of a level of 100 steps."""
        return self.losses.tail.error / math.sqrt(LEVEL_BLOCKS * BLOCK) if len(self.losses) else 0.0

    def to_state(self) -> dict[str, Any]:
        warmup = self.warmup
        return {
            "values": [
                *(self.alone, self.fresh, self.first, self.start),
                *(self.level, self.best, self.best_step, self.best_time),
            ],
            "troubles": sorted(self.troubles),
            "warmup": [warmup.highest, warmup.since, warmup.over],
            "losses": self.losses.to_state(),
            "recent": [None if math.isnan(value) else value for value in self.recent],
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], milestones: Milestones) -> Past:
        self = cls(milestones=milestones)
        values = state["values"]
        self.alone, self.fresh, self.first, self.start, self.level, self.best, self.best_step, self.best_time = values
        self.troubles = set(state["troubles"])
        self.warmup = Warmup(*state["warmup"])
        self.losses.restore(state["losses"])
        self.recent = [math.nan if value is None else value for value in state["recent"]]
        return self
