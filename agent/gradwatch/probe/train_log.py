"""What the loop logs of its training: losses, sample counts, metrics. Which step they belong to."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from gradwatch.probe.lane import on_host
from gradwatch.probe.recorder import Number, Recorder


class TrainLog:
    """Losses find their step by where the loop logs them.

    Logged behind ``optimizer.step()``, a loss belongs to that step; where the
    first loss comes before the first step, losses belong to the step that
    follows. Several in one step (micro-batches) count with their mean.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._before_step: bool | None = None
        self._pending: Number = None
        self._count = 0
        self._since = 0
        self._samples = math.nan
        #: Whether the loop ever said how many samples a step consumed.
        self.samples_logged = False
        self._sums: dict[str, tuple[Any, int]] = {}

    def loss(self, loss: Tensor | float) -> None:
        """Note a loss; a device tensor stays one."""
        value: Number = loss
        if isinstance(loss, Tensor):
            value = loss.detach()
            if value.numel() != 1:
                value = value.float().mean()
            if on_host(value):
                value = value.item()
        self.metric("loss", value)
        recorder = self._recorder
        if self._before_step is None:
            self._before_step = recorder.sequence == 0
        if not self._before_step and self._since != recorder.sequence:
            self._since, self._count = recorder.sequence, 0
        self._count += 1
        self._pending = value if self._count == 1 else self._pending + value  # type: ignore[operator]
        if not self._before_step:
            recorder.add_loss(self._mean())

    def _mean(self) -> Number:
        """Mean of what was logged for one step; a device tensor where the losses are."""
        return self._pending if self._count == 1 else self._pending / self._count  # type: ignore[operator]

    def samples(self, count: int | float) -> None:
        """Samples of the step under way (or, with losses logged behind it, of the next)."""
        self.samples_logged = True
        self._samples = count if math.isnan(self._samples) else self._samples + count

    def metric(self, name: str, value: Any) -> None:
        """Add a training metric to the mean that the next validation is compared with."""
        former, count = self._sums.get(name, (0.0, 0))
        self._sums[name] = (former + (value.detach() if isinstance(value, Tensor) else value), count + 1)

    def take_loss(self) -> Number:
        """The loss for the row that is being written, if losses come before their step."""
        if not self._before_step or self._count == 0:
            return None
        loss = self._mean()
        self._pending, self._count = None, 0
        return loss

    def take_samples(self) -> float:
        count, self._samples = self._samples, math.nan
        return count

    def take_means(self) -> dict[str, Any]:
        """Means of the training metrics since the last validation."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means
