"""Do gradients arrive where an optimizer waits for them, and are they cleared in between?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from gradwatch.probe.contract.report import Report
from gradwatch.probe.lane import Values, gather, on_host

if TYPE_CHECKING:
    from gradwatch.probe.optimizer import OptimizerProbe
    from gradwatch.probe.session import Session

#: Steps without a single gradient before a parameter counts as never reached.
MISSING_STEPS: Final = 200
#: Steps in a row whose backward passes all added to old gradients.
UNCLEARED_STEPS: Final = 3
#: Steps in a row that began cleared, after which the question is asked at every 64th step only.
TRUSTED: Final = 256


class GradientChecks:
    """Whether gradients come, and whether they are cleared, for one optimizer."""

    def __init__(self, session: Session, report: Report) -> None:
        self._session, self._report = session, report
        #: Whether some parameter may still be one that no gradient ever reaches.
        self.awaits = True
        self._reached: set[int] = set()
        # Of the attempted step under way: has any backward pass begun with cleared gradients, and
        # how many asked a device whose answer is not here yet.
        self._cleared = False
        self._asked: list[Tensor] = []
        self._clean = 0
        self._dirty = 0

    # -- cleared

    def ask(self, probe: OptimizerProbe, parameter: Tensor) -> Tensor | None:
        """The largest value of the gradient that a pass is about to add to, where nobody knows whether it is zero.

        ``set_to_none=False`` leaves zeros: only their values tell, so they are
        asked for on their device and not waited for.
        """
        if self._cleared or len(self._asked) >= 16 or (self._clean >= TRUSTED and probe.taken % 64):
            return None
        grad = parameter.grad
        return None if grad is None else grad.detach().abs().amax()

    def backward(self, cleared: bool, asked: Tensor | None) -> None:
        """A backward pass has accumulated."""
        if cleared or (asked is None and self._clean >= TRUSTED):
            self._cleared = True
        elif asked is not None:
            self._asked.append(asked)

    def after_step(self, probe: OptimizerProbe) -> None:
        """The step is done: was there a backward pass before it that began cleared?"""
        cleared, asked = self._cleared, self._asked
        self._cleared = False
        if asked:
            self._asked = []
        if probe.taken == 0:
            return  # before the first step there was nothing to clear
        if cleared or not asked:
            if cleared:
                self._clean += 1
                self._dirty = 0
            return
        step = probe.step

        def judge(values: Values) -> None:
            if (values == 0).any():
                self._clean += 1
                self._dirty = 0
                return
            self._clean = 0
            self._dirty += 1
            if self._dirty >= UNCLEARED_STEPS:
                self._report.violation(
                    "gradients-not-cleared",
                    step,
                    f"in {self._dirty} steps in a row, every backward pass added to gradients of the former step",
                    {"steps_in_a_row": self._dirty, "optimizer": probe.name},
                )

        vector = torch.stack(asked)
        if on_host(vector):
            judge(vector.float().numpy())
        else:
            self._session.lane.send(gather(asked), judge)

    # -- missing

    def before_step(self, probe: OptimizerProbe) -> None:
        """Note which parameters have a gradient, where not all have."""
        absent = [
            (name, parameter)
            for name, parameter, _ in probe.holds.named()
            if parameter.grad is None and parameter.requires_grad and id(parameter) not in self._reached
        ]
        if probe.taken >= MISSING_STEPS:
            self.awaits = False
            if absent and len(absent) < len(probe.holds.parameters):
                names = [name for name, _ in absent]
                self._report.violation(
                    "gradients-missing",
                    probe.step,
                    f"{len(names)} optimized tensors got no gradient in {MISSING_STEPS} steps, such as {names[0]}",
                    {"tensors": names[:20], "count_tensors": len(names), "optimizer": probe.name},
                )
            self._reached.clear()
        elif absent:
            missing = {id(parameter) for _, parameter in absent}
            self._reached |= {id(p) for p in probe.holds.parameters if id(p) not in missing}
        else:
            self.awaits = False
