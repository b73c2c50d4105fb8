"""Counts backward passes, with one hook on one parameter of each optimizer.

The hook runs before the gradient is accumulated, so what the pass adds to can
still be seen.

A hook on every parameter would cost more than everything else together. One
parameter is enough, as long as it takes part; where it does not, the hook
moves on to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from gradwatch.probe.contract import Contracts
    from gradwatch.probe.optimizer import OptimizerProbe


class BackwardWatch:
    """One rotating gradient hook for each optimizer."""

    def __init__(self, probes: Sequence[OptimizerProbe], contracts: Contracts) -> None:
        self._hooks = [_Hook(probe, contracts) for probe in probes]

    def attach(self) -> None:
        for hook in self._hooks:
            hook.move()

    def detach(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def unseen(self, probe: OptimizerProbe) -> None:
        """A step was taken and no backward pass seen before it: the hook sits on the wrong parameter."""
        self._hooks[probe.index].move()


class _Hook:
    def __init__(self, probe: OptimizerProbe, contracts: Contracts) -> None:
        self._probe, self._contracts = probe, contracts
        self._handle: Any = None
        self._turn = 0

    def move(self) -> None:
        """Sit on the next parameter that may get a gradient, beginning with the last, whose comes first."""
        self.remove()
        candidates = [p for p in self._probe.parameters if p.requires_grad and p.is_leaf]
        if not candidates:
            return
        self._turn += 1
        chosen: Any = candidates[-(self._turn % len(candidates))]
        self._probe.watched = chosen
        self._handle = chosen.register_hook(self._seen(chosen))

    def _seen(self, parameter: Tensor) -> Callable[[Tensor], None]:
        probe, contracts = self._probe, self._contracts
        aside = probe.session.aside

        def seen(_: Tensor) -> None:
            if aside.off:
                return
            try:
                contracts.backward(probe, parameter)
            except Exception as error:
                aside.failed(error, "observing a backward pass")
            probe.attempted.backwards += 1

        return seen

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
