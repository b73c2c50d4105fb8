"""When one optimizer's steps are sampled, and what of a sample is under way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from gradwatch.probe.sampling import Sample

if TYPE_CHECKING:
    from gradwatch.probe.optimizer import OptimizerProbe


class Sampler:
    """Copies weights before a sampled step and hands the sample over behind it; off after an out-of-memory."""

    def __init__(self, probe: OptimizerProbe) -> None:
        self._probe = probe
        self._sample: Sample | None = None
        self._first = 0
        self._off = False

    def begin(self) -> None:
        """The optimizer is about to take a sampled step."""
        if self._off:
            return
        session, holds = self._probe.session, self._probe.holds
        try:
            parameters, columns = holds.listed()
            self._sample = Sample(parameters, columns, holds.state(), self._first, session.histograms)
            self._first = self._sample.next_first
        except torch.OutOfMemoryError:
            self._sample = None
            self._off = True
            session.aside.say("out of memory while copying weights: samples are off for this run")

    def take(self) -> Sample | None:
        """The sample under way, if there is one: the step is done, or will not be."""
        sample, self._sample = self._sample, None
        return sample
