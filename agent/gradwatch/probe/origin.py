"""Was a loss computed before the last step, or behind it? Autograd's own count of operations tells.

Every operation that autograd records gets the next number of its thread. A loss
whose graph reaches back before the number at which the last step stood is that
step's; one that does not is of the step to come. A plain number has no graph:
there it counts whether anything was recorded since.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any, Final

import torch
from torch import Tensor

_count: Callable[[], int] | None = getattr(torch._C._autograd, "_get_sequence_nr", None)
#: Operations that a loop puts behind its loss for the record, such as a mean over micro-batches.
_DEPTH: Final = 6


class StepMark:
    """Where the last step stood in its thread's count."""

    def __init__(self) -> None:
        self._thread = get_ident()
        self._at = _count() if _count is not None else 0
        #: Whether autograd ever counted on between two steps: where gradients come from elsewhere it tells nothing.
        self._counts = False

    def set(self) -> None:
        """A step is done."""
        if _count is None:
            return
        thread, at = get_ident(), _count()
        self._counts |= thread == self._thread and at != self._at
        self._thread, self._at = thread, at

    @property
    def passed(self) -> bool:
        """Whether an operation was recorded behind the last step, in its thread."""
        return _count is not None and get_ident() == self._thread and _count() != self._at

    def is_behind(self, loss: Tensor | float) -> bool | None:
        """Whether ``loss`` was computed behind the last step; None where that cannot be told."""
        if _count is None or not self._counts or get_ident() != self._thread:
            return None
        node: Any = loss.grad_fn if isinstance(loss, Tensor) else None
        if node is None:
            return _count() != self._at
        for _ in range(_DEPTH):
            if node._sequence_nr() < self._at:
                return False
            node = next((n for n, _ in node.next_functions if n is not None and not _is_leaf(n)), None)
            if node is None:
                break
        return True


def _is_leaf(node: Any) -> bool:
    return type(node).__name__ == "AccumulateGrad"
