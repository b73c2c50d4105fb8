"""Does the learning rate move with optimizer steps, and not with micro-batches?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from gradwatch.probe.contract.report import Report

if TYPE_CHECKING:
    from gradwatch.probe.optimizer import OptimizerProbe


class ScheduleChecks:
    """Compares the learning rate at the backward passes of one attempted step."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._at_backward: Any = None
        self._moved = 0

    def backward(self, probe: OptimizerProbe) -> None:
        """A backward pass: has the rate moved since the one before it?"""
        rate = probe.holds.groups[0]["lr"]
        if isinstance(rate, Tensor):
            return
        former = self._at_backward
        self._at_backward = rate
        if former is not None and rate != former and self._scheduled(probe):
            self._violation(probe, former, rate, "between two micro-batches of one step")

    def restart(self) -> None:
        """Begin a new attempted step."""
        self._at_backward = None

    def before_step(self, probe: OptimizerProbe) -> None:
        """The first optimizer step: a scheduler that was stepped before it lost its first value."""
        former, self._at_backward = self._at_backward, None
        if probe.taken != 0 or former is None:
            return
        rate = probe.holds.groups[0]["lr"]
        if not isinstance(rate, Tensor) and rate != former and self._scheduled(probe):
            self._violation(probe, former, rate, "before the first optimizer step")

    def _scheduled(self, probe: OptimizerProbe) -> bool:
        """Whether one of torch's schedulers drives this optimizer; who sets rates by hand may do so anywhere."""
        return any(hasattr(o.step, "_wrapped_by_lr_sched") for o in probe.optimizers)

    def _violation(self, probe: OptimizerProbe, former: float, rate: float, where: str) -> None:
        self._report.violation(
            "scheduler-per-microbatch",
            probe.step,
            f"the learning rate moved from {former:g} to {rate:g} {where}",
            {"from": former, "to": rate, "optimizer": probe.name},
        )
