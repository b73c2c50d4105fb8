"""The contract checks of a run, called in the order of the loop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gradwatch.probe.contract import setup
from gradwatch.probe.contract.clips import ClipChecks
from gradwatch.probe.contract.gradients import GradientChecks
from gradwatch.probe.contract.report import Report
from gradwatch.probe.contract.schedule import ScheduleChecks

if TYPE_CHECKING:
    from gradwatch.probe.optimizer import OptimizerProbe
    from gradwatch.probe.recorder import Row
    from gradwatch.probe.session import Session

#: Step at which what reproduction needs must be known.
COMPLETE_BY: Final = 20
#: Samples in a row in which coupled decay outweighed the clipped gradient.
DOMINATES_SAMPLES: Final = 3


class Contracts:
    """One object a run; a handful of comparisons a step where everything is in order."""

    def __init__(self, session: Session, facts: Mapping[str, Any]) -> None:
        self._session = session
        self._facts = facts
        self.report = Report(session.event)
        count = len(facts["optimizers"])
        self._clips = [ClipChecks(session, self.report) for _ in range(count)]
        self._gradients = [GradientChecks(session, self.report) for _ in range(count)]
        self._schedules = [ScheduleChecks(self.report) for _ in range(count)]
        self._dominates = [0] * count

    def ask(self, probe: OptimizerProbe, parameter: Tensor) -> Tensor | None:
        """What a pass is about to add to, where that has to be asked for (see ``GradientChecks``)."""
        return self._gradients[probe.index].ask(probe, parameter)

    def backward(self, probe: OptimizerProbe, cleared: bool, asked: Tensor | None) -> None:
        """A backward pass has accumulated: into nothing, or into what ``asked`` is the largest value of."""
        self._gradients[probe.index].backward(cleared, asked)
        self._schedules[probe.index].backward(probe)

    def given_up(self, probe: OptimizerProbe) -> None:
        """Gradients were cleared without a step: the next backward pass begins a new attempt."""
        self._schedules[probe.index].restart()

    def regrouped(self, probe: OptimizerProbe) -> None:
        """The optimizer's parameters or groups are others now."""
        self._clips[probe.index].regrouped()

    def before_step(self, probe: OptimizerProbe) -> None:
        """Gradients are as the optimizer will use them."""
        index = probe.index
        self._clips[index].before_step(probe)
        gradients = self._gradients[index]
        if gradients.awaits:
            gradients.before_step(probe)
        self._schedules[index].before_step(probe)

    def after_step(self, probe: OptimizerProbe) -> None:
        """The optimizer has stepped, its row is written."""
        self._gradients[probe.index].after_step(probe)
        if probe.taken == COMPLETE_BY and probe.index == 0:
            self._check_metadata(probe)

    def row_landed(self, row: Row, grad_norm: float, grad_norm_l2: float) -> None:
        """The values of a row that took the long way are on the host."""
        clip = row.clips[0] if len(row.clips) == 1 else None
        # A reported norm may be of shards elsewhere: nothing here could say that it is wrong.
        if clip is not None and clip.whole and clip.scale is None and not (clip.logged or clip.own_total):
            self._clips[row.optimizer].landed(row.step, clip.norm_type, grad_norm, grad_norm_l2)

    def sample_landed(
        self, probe: OptimizerProbe, step: int, clipped_norm: float, weight_norms: npt.NDArray[np.float32]
    ) -> None:
        """A sample is on the host: does coupled decay outweigh what the clip left of the gradient?

        torch adds ``λw`` to the gradient inside ``step()``, behind the clip. Only
        where the clip bound is this asked: in equilibrium λ‖w‖ equals ‖g‖ by itself.
        """
        optimizer = self._facts["optimizers"][probe.index]
        if optimizer["decay"] != "coupled" or not math.isfinite(clipped_norm):
            return
        decays = probe.holds.decay_of_columns(len(weight_norms))
        known = np.isfinite(weight_norms) & (decays > 0)
        pull = float(np.sqrt(np.sum((decays[known] * weight_norms[known].astype(np.float64)) ** 2)))
        self._dominates[probe.index] = self._dominates[probe.index] + 1 if pull > clipped_norm else 0
        if self._dominates[probe.index] >= DOMINATES_SAMPLES:
            self.report.violation(
                "decay-dominates-gradient",
                step,
                f"coupled decay λ‖w‖ = {pull:.4g} exceeds the clipped gradient norm {clipped_norm:.4g}",
                {"decay_norm": pull, "clipped_norm": clipped_norm, "optimizer": probe.name},
            )

    def _check_metadata(self, probe: OptimizerProbe) -> None:
        train = self._session.train
        missing = setup.missing_hyperparameters(
            self._facts["config"], self._facts["optimizers"], train.samples_logged, True
        )
        if missing:
            self.report.violation(
                "hyperparameters-missing",
                probe.step,
                f"unknown and needed to reproduce this run: {', '.join(missing)}",
                {"missing": missing},
            )
