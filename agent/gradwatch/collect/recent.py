"""What the last steps were: exact counts of the recent window, maximum of a minute, quantiles of 1,000 steps.

Bounded whatever the rate: steps are counted by whole seconds, and by single
steps only as far back as the recent window must reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from gradwatch.catalog import QUANTILES
from gradwatch.collect.packed import pack, unpack
from gradwatch.collect.rows import F64, Mask

#: The recent window: so many seconds, and no fewer steps than this.
RECENT_SECONDS: Final = 1800
RECENT_STEPS: Final = 200
MAX_SECONDS: Final = 60
QUANTILE_STEPS: Final = 1_000

# Columns of the seconds' table and of the last steps.
_SECOND, _STEPS, _CLIPPED, _NONFINITE, _MAX = range(5)


@dataclass(frozen=True, slots=True)
class Counts:
    """Steps of the recent window: all, clipped, non-finite. Skipped attempts are no steps; replayed ones are."""

    steps: int
    clipped: int
    nonfinite: int


class Steps(Protocol):
    """Steps in their order, such as :class:`gradwatch.collect.rows.Rows`; an entry of each array a step."""

    @property
    def time(self) -> F64: ...
    @property
    def norm(self) -> F64: ...
    @property
    def clipped(self) -> Mask: ...
    @property
    def nonfinite(self) -> Mask: ...
    def __len__(self) -> int: ...


class Recent:
    """Recent steps of one optimizer.

    The window ends with the last step, not now, and its clock runs forward
    only (a clock set back adds nothing), so that it is a function of the rows
    alone. It begins at a whole second.
    """

    def __init__(self) -> None:
        self._clock = 0.0
        self._last_time = 0.0
        self._seconds: F64 = np.empty((0, 5))
        self._last: F64 = np.empty((0, 3))
        self._norms: F64 = np.empty(0)

    def add(self, rows: Steps) -> None:
        """Take in steps (not skipped attempts)."""
        if not len(rows):
            return
        before = np.concatenate([[self._last_time or rows.time[0]], rows.time[:-1]])
        clock = (self._clock or float(rows.time[0])) + np.cumsum(np.maximum(0.0, rows.time - before))
        self._clock, self._last_time = float(clock[-1]), float(rows.time[-1])
        clipped, nonfinite = rows.clipped.astype(float), rows.nonfinite.astype(float)
        norm = np.where(np.isfinite(rows.norm), rows.norm, -np.inf)
        second, first = np.unique(np.floor(clock), return_index=True)
        fresh = np.empty((len(second), 5))
        fresh[:, _SECOND] = second
        fresh[:, _STEPS] = np.diff(np.append(first, len(rows)))
        fresh[:, _CLIPPED] = np.add.reduceat(clipped, first)
        fresh[:, _NONFINITE] = np.add.reduceat(nonfinite, first)
        fresh[:, _MAX] = np.maximum.reduceat(norm, first)
        table = self._seconds
        if len(table) and table[-1, _SECOND] == second[0]:
            fresh[0, _STEPS:_MAX] += table[-1, _STEPS:_MAX]
            fresh[0, _MAX] = max(fresh[0, _MAX], table[-1, _MAX])
            table = table[:-1]
        table = np.concatenate([table, fresh])
        self._seconds = table[table[:, _SECOND] > np.floor(self._clock) - RECENT_SECONDS]
        steps = np.column_stack([np.ones(len(rows)), clipped, nonfinite])
        self._last = np.concatenate([self._last, steps])[-RECENT_STEPS:]
        finite = np.where(np.isfinite(rows.norm), rows.norm, np.nan)
        self._norms = np.concatenate([self._norms, finite])[-QUANTILE_STEPS:]

    @property
    def counts(self) -> Counts:
        sums = self._seconds[:, _STEPS:_MAX].sum(axis=0)
        if sums[0] < RECENT_STEPS:
            sums = self._last.sum(axis=0)
        return Counts(*(int(value) for value in sums))

    @property
    def largest_norm(self) -> float | None:
        """Largest finite norm of the last minute; None where there is none."""
        table = self._seconds
        if not len(table):
            return None
        largest = float(table[table[:, _SECOND] > np.floor(self._clock) - MAX_SECONDS, _MAX].max())
        return largest if np.isfinite(largest) else None

    @property
    def quantiles(self) -> dict[float, float]:
        """Quantiles (linearly interpolated) of the finite norms among the last 1,000 steps."""
        finite = self._norms[~np.isnan(self._norms)]
        if not len(finite):
            return {}
        values = np.quantile(finite, QUANTILES)
        return dict(zip(QUANTILES, (float(v) for v in values)))

    def to_state(self) -> dict[str, Any]:
        return {
            "clock": self._clock,
            "last_time": self._last_time,
            "seconds": pack(self._seconds),
            "last": pack(self._last),
            "norms": pack(self._norms),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Recent:
        self = cls()
        self._clock, self._last_time = float(state["clock"]), float(state["last_time"])
        self._seconds = unpack(state["seconds"]).reshape(-1, 5)
        self._last = unpack(state["last"]).reshape(-1, 3)
        self._norms = unpack(state["norms"])
        return self
