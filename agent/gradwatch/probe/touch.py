"""Did code that is not seen change gradients, between the backward pass and whoever looks at them now?

Told by the version counter of one gradient, which counts changes in place. It
is read only where somebody may ask, and not believed where it does not tell the
truth: DDP writes into gradients behind the hook that reads it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Touch:
    """The version of one gradient behind the last backward pass."""

    def __init__(self) -> None:
        self._parameter: Tensor | None = None
        self._version = 0

    def note(self, parameter: Tensor | None) -> None:
        """A backward pass is through; None where nobody will ask."""
        grad = None if parameter is None else parameter.grad
        self._parameter = None if grad is None else parameter
        if grad is not None:
            self._version = grad._version

    def happened(self, seen: int = 0) -> bool:
        """Whether its gradient was changed in place more often than the ``seen`` times that are known of."""
        grad = None if self._parameter is None else self._parameter.grad
        return grad is not None and not _is_distributed() and grad._version != self._version + seen


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
