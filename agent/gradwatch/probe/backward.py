"""Counts backward passes, with one hook on one parameter of each optimizer.

The hook runs before the gradient is accumulated, so what the pass adds to can
still be seen.

A hook on every parameter would cost more than everything else together. One
parameter is enough, as long as it takes part; where it does not, the hook
moves on to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

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


#: Parameters that the hook tries before its silence is taken for the absence of backward passes.
TRIES: Final = 8


class _Hook:
    """Two hooks on one parameter: what a pass adds to is seen before, that it added is seen behind.

    The first alone would take ``torch.autograd.grad`` for a backward pass, which
    runs it and accumulates nothing.
    """

    def __init__(self, probe: OptimizerProbe, contracts: Contracts) -> None:
        self.probe, self.contracts = probe, contracts
        self.aside = probe.session.aside
        #: The parameter's dictionaries of hooks, and the number of ours in each.
        self._put: list[tuple[dict[int, Any], int]] = []
        self._turn = 0

    def move(self) -> None:
        """Sit on the next parameter that may get a gradient, beginning with the last, whose comes first."""
        self.remove()
        candidates = [p for p in self.probe.holds.parameters if p.requires_grad and p.is_leaf]
        if not candidates:
            self.probe.searching = False
            return
        self._turn += 1
        self.probe.searching = self._turn <= min(len(candidates), TRIES)
        chosen: Any = candidates[-(self._turn % len(candidates))]
        self.probe.watched = chosen
        begins, accumulated = self._observers(chosen)
        before, behind = chosen.register_hook(begins), chosen.register_post_accumulate_grad_hook(accumulated)
        self._put = [(chosen._backward_hooks, before.id), (chosen._post_accumulate_grad_hooks, behind.id)]

    def _observers(self, parameter: Tensor) -> tuple[Callable[[Tensor], None], Callable[[Tensor], None]]:
        # The parameter may outlive the run, and must not keep it.
        here = ref(self)
        cleared, asked = False, None

        def begins(_: Tensor) -> None:
            nonlocal cleared, asked
            hook = here()
            if hook is None or hook.aside.off or hook.probe.frozen:
                return
            try:
                cleared = parameter.grad is None
                asked = None if cleared else hook.contracts.ask(hook.probe, parameter)
            except Exception as error:
                hook.aside.failed(error, "observing a backward pass")

        def accumulated(_: Tensor) -> None:
            hook = here()
            if hook is None or hook.aside.off or hook.probe.frozen:
                return
            try:
                probe, contracts = hook.probe, hook.contracts
                attempted = probe.attempted
                if attempted.refused is not None:
                    probe.give_up()
                    contracts.given_up(probe)
                    attempted = probe.attempted
                elif cleared and attempted.backwards:
                    # Gradients were cleared without a step: what was seen of them belongs to nothing.
                    attempted.clear()
                    contracts.given_up(probe)
                attempted.measured = None
                probe.searching = False
                contracts.backward(probe, cleared, asked)
                attempted.backwards += 1
                asks = probe.session.scaled or probe.sampled
                probe.touch.note(parameter if asks else None)
            except Exception as error:
                hook.aside.failed(error, "observing a backward pass")

        for observer in (begins, accumulated):
            # A model is pickled for other processes without its hooks, as torch says, and without its warning.
            observer.__torch_unserializable__ = True  # type: ignore[attr-defined]
        return begins, accumulated

    def remove(self) -> None:
        # Not by torch's handles: they know their dictionaries weakly, and no longer when the collector ends a run.
        for hooks, number in self._put:
            hooks.pop(number, None)
        self._put = []
