"""What the loop logs of its training: losses, sample counts, metrics. Which step they belong to."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from gradwatch.probe.lane import on_host
from gradwatch.probe.origin import StepMark
from gradwatch.probe.recorder import Number, Recorder


class TrainLog:
    """Losses find their step by when they were computed, whether logged before or behind ``optimizer.step()``.

    Autograd tells that (`gradwatch.probe.origin`). Where it cannot, they belong
    to the step that follows in a loop that logs before its first step, else to
    the last one. Several of one step (micro-batches) count with their mean.
    """

    def __init__(self, recorder: Recorder, uncertain: Callable[[], None] = lambda: None) -> None:
        self._recorder = recorder
        #: Called once where losses may stand one step off.
        self._uncertain = uncertain
        self._mark = StepMark()
        #: Losses of the step to come, and of the last one.
        self._next, self._last = _Mean(), _Mean()
        #: Those of an attempt of which it is open whether a step follows, and its samples.
        self._held: _Mean | None = None
        self._held_samples = math.nan
        #: Where autograd is silent: whether the first loss came before the first step.
        self._ahead: bool | None = None
        #: Whether what was logged ahead may be no loss of a step, such as an evaluation before training.
        self._doubtful = self._said = False
        self._samples = math.nan
        #: Whether the loop ever said how many samples a step consumed.
        self.samples_logged = False
        self._sums: dict[str, tuple[Any, int]] = {}

    def loss(self, loss: Tensor | float) -> None:
        """Note a loss; a device tensor stays one."""
        ahead = self._is_ahead(loss)
        value: Number = loss
        if isinstance(loss, Tensor):
            value = loss.detach()
            if value.numel() != 1:
                value = value.float().mean()
            if on_host(value):
                value = value.item()
        self.metric("loss", value)
        if ahead:
            self._next.add(value)
            return
        if self._held is not None:
            self._held.add(value)
            return
        if self._doubtful:
            self._last, self._doubtful = _Mean(), False
        self._last.add(value)
        self._recorder.add_loss(self._last.value)

    def _is_ahead(self, loss: Tensor | float) -> bool:
        """Whether a loss is of the step to come."""
        if self._recorder.sequence == 0:
            if self._ahead is None:
                self._ahead, self._doubtful = True, not self._mark.passed
            return True
        behind = self._mark.is_behind(loss)
        if behind is not None:
            return behind
        if self._ahead is None:
            self._ahead = False
        if self._ahead and self._doubtful and not self._said:
            self._said = True
            self._uncertain()
        return self._ahead

    def samples(self, count: int | float) -> None:
        """Samples of the step under way (or, with losses logged behind it, of the next)."""
        self.samples_logged = True
        self._samples = count if math.isnan(self._samples) else self._samples + count

    def metric(self, name: str, value: Any) -> None:
        """Add a training metric to the mean that the next validation is compared with."""
        former, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (former + (value.detach() if isinstance(value, Tensor) else value), count + 1)

    def hold_back(self) -> None:
        """An attempted step may come to nothing: what was logged so far is its, what is computed from now on not."""
        self._mark.set()
        self._held, self._next = self._next, _Mean()
        self._held_samples, self._samples = self._samples, math.nan

    def take(self, given_up: bool = False) -> tuple[Number, float]:
        """Loss and samples for the row that is being written, of what was logged ahead of it."""
        if self._held is not None:
            return self._take_held(given_up)
        self._mark.set()
        # The two change places: nothing is made anew at a step.
        last, self._next = self._next, self._last
        self._last = last
        self._next.clear()
        count, self._samples = self._samples, math.nan
        return last.value, count

    def _take_held(self, given_up: bool) -> tuple[Number, float]:
        held, count, self._held = self._held, self._held_samples, None
        assert held is not None
        if given_up:
            self._last = held
            return held.value, count
        loss, samples = self.take()
        if held.count:
            self._last.join(held)
            loss = self._last.value
        return loss, count if math.isnan(samples) else samples if math.isnan(count) else count + samples

    def take_means(self) -> dict[str, Any]:
        """Means of the training metrics since the last validation."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means


class _Mean:
    """The mean of numbers; a device tensor where they are."""

    __slots__ = ("count", "total")

    def __init__(self) -> None:
        self.total: Any = None
        self.count = 0

    def add(self, value: Number) -> None:
        self.total = value if self.count == 0 else self.total + value
        self.count += 1

    def clear(self) -> None:
        self.total = None
        self.count = 0

    def join(self, other: _Mean) -> None:
        if other.count:
            self.total = other.total if self.count == 0 else self.total + other.total
            self.count += other.count

    @property
    def value(self) -> Number:
        """None of nothing."""
        return self.total / self.count if self.count > 1 else self.total  # type: ignore[no-any-return]
