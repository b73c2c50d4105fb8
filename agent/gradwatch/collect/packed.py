"""Arrays in the agent's state files: JSON-safe, exact to the bit, small."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import numpy.typing as npt


def pack(array: npt.NDArray[Any]) -> str:
    """A float64 or int64 array as text."""
    return f"{array.dtype.char}:{base64.b64encode(array.tobytes()).decode()}"


def unpack(text: str) -> npt.NDArray[Any]:
    """The array again. Raises ``ValueError`` for what :func:`pack` did not write."""
    kind, _, data = text.partition(":")
    if kind not in ("d", "l", "q"):
        raise ValueError(f"not a packed array: {text[:20]!r}")
    return np.frombuffer(base64.b64decode(data, validate=True), np.dtype(kind)).copy()
