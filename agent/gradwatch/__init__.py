"""gradwatch: the flight recorder and the pager for PyTorch training.

    run = gradwatch.watch(model, optimizer, max_norm=1.0)

The public names are those of ``__all__``. ``watch`` and ``Run`` belong to the
training process and import torch when they are first used; the agent's side
never does.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Run", "__version__", "watch"]

if TYPE_CHECKING:
    from gradwatch.probe.run import Run, watch


def __getattr__(name: str) -> Any:
    if name in ("Run", "watch"):
        return getattr(importlib.import_module("gradwatch.probe.run"), name)
    raise AttributeError(f"module 'gradwatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
