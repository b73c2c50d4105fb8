"""A histogram that only grows, as Prometheus counts: values up to each upper bound, their sum and number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gradwatch.collect.rows import F64


class Distribution:
    """Counts of values by upper bounds; the last bucket has none."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = np.zeros(len(self.bounds) + 1, dtype=np.int64)
        self.sum = 0.0

    def add(self, values: F64) -> None:
        """Count the finite ones; a bound belongs to the bucket below it."""
        finite = values[np.isfinite(values)]
        if len(finite):
            which = np.searchsorted(self.bounds, finite, side="left")
            self.counts += np.bincount(which, minlength=len(self.counts))
            self.sum += float(finite.sum())

    @property
    def cumulative(self) -> list[tuple[str, float]]:
        """Buckets as the exposition has them: (upper bound, how many are no larger)."""
        names = [repr(bound) for bound in self.bounds] + ["+Inf"]
        return list(zip(names, np.cumsum(self.counts).astype(float).tolist()))

    def to_state(self) -> dict[str, Any]:
        return {"counts": self.counts.tolist(), "sum": self.sum}

    def restore(self, state: dict[str, Any]) -> None:
        counts = np.asarray(state["counts"], dtype=np.int64)
        if counts.shape != self.counts.shape:
            raise ValueError("a histogram of other buckets")
        self.counts, self.sum = counts, float(state["sum"])
