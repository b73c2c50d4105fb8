"""gradwatch: the flight recorder and the pager for PyTorch training."""

from __future__ import annotations

__version__ = "0.1.0"
