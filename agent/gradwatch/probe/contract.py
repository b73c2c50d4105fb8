"""Contract checks: what the training code does wrong, whatever the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from gradwatch.probe.optimizer import OptimizerProbe
    from gradwatch.probe.seam import ClipEvent
    from gradwatch.probe.session import Session


class Contracts:
    """Called at each point of an attempted step, in the order of the loop."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def backward(self, probe: OptimizerProbe, parameter: Tensor) -> None:
        """A backward pass has accumulated into ``parameter``."""

    def clipped(self, probe: OptimizerProbe, event: ClipEvent) -> None:
        """A clip by norm has run."""

    def before_step(self, probe: OptimizerProbe) -> None:
        """Gradients are as the optimizer will use them."""

    def after_step(self, probe: OptimizerProbe) -> None:
        """The optimizer has stepped, its row is written."""
