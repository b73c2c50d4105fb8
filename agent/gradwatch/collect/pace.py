"""How long steps take: the median, the longest pause, and for how long silence is no news."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from gradwatch.collect.packed import pack, unpack
from gradwatch.collect.rows import F64

_KEPT: Final = 1_000
#: A run without a step for this long is looked at; slow or pausing runs get more, starting ones their own.
STALL_SECONDS: Final = 600.0
STARTING_SECONDS: Final = 1800.0


class Pace:
    """Step durations of a run, over all its attempts."""

    def __init__(self) -> None:
        self._durations: F64 = np.empty(0)
        self.longest = 0.0

    def add(self, durations: F64) -> None:
        sane = durations[np.isfinite(durations) & (durations >= 0)]
        if len(sane):
            self._durations = np.concatenate([self._durations, sane])[-_KEPT:]
            self.longest = max(self.longest, float(sane.max()))

    @property
    def median(self) -> float | None:
        """Median duration of the last 1,000 steps, in seconds."""
        return float(np.median(self._durations)) if len(self._durations) else None

    def allowance(self, stepped: bool) -> float:
        """Seconds without a step after which a run counts as stalled: ``max(10 min, 20 × the median step, 2 × the
        longest pause so far)``, and before the first step of an attempt no less than 30 minutes."""
        usual = max(STALL_SECONDS, 20.0 * (self.median or 0.0), 2.0 * self.longest)
        return usual if stepped else max(usual, STARTING_SECONDS)

    def to_state(self) -> dict[str, Any]:
        return {"durations": pack(self._durations), "longest": self.longest}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Pace:
        self = cls()
        self._durations, self.longest = unpack(state["durations"]), float(state["longest"])
        return self
