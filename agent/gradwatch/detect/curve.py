"""What the detectors over curves share: steps in blocks of ten, and what is known of an optimizer's past.

A curve is judged block by block, a block being ten steps of one optimizer in
one attempt. Blocks begin where the attempt begins, so that what is found does
not depend on how the stream was cut, and a median over ten is robust against
the odd batch and cheap beside ten steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from gradwatch.collect.packed import pack, unpack
from gradwatch.collect.rows import F64, Mask, Rows

#: Steps of a block.
BLOCK: Final = 10
_COLUMNS: Final = 9
_STEP, _TIME, _LOSS, _NORM, _RATE, _COEFFICIENT, _CLIPPED, _THRESHOLD, _NONFINITE = range(_COLUMNS)


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps of a block one by one, as :class:`gradwatch.collect.recent.Recent` counts them."""

    time: F64
    norm: F64
    clipped: Mask
    nonfinite: Mask

    def __len__(self) -> int:
        return len(self.time)


@dataclass(frozen=True, slots=True)
class Block:
    """Ten consecutive steps of one optimizer; values that are not finite are left out."""

    #: Number and Unix time of the last step, number of the first.
    step: int
    time: float
    first_step: int
    #: Steps of the optimizer in this attempt, this block included.
    position: int
    #: Finite losses in their order, and their median, NaN where none was logged.
    losses: F64
    loss: float
    #: Finite pre-clip norms, zeros included, and their median.
    norms: F64
    norm: float
    #: Learning rate at the last step, the highest of the parameter groups.
    rate: float
    #: Median clip coefficient, NaN where nothing clips.
    coefficient: float
    #: Steps that were clipped, and the threshold of the last clip, NaN where there was none.
    clipped: int
    threshold: float
    steps: Steps


class Blocks:
    """Cuts the steps of one optimizer in one attempt into blocks."""

    def __init__(self) -> None:
        self._pending: F64 = np.empty((0, _COLUMNS))
        self._position = 0

    def add(self, rows: Rows) -> list[Block]:
        """Take in steps that were taken; the blocks that are complete now."""
        table = np.concatenate([self._pending, _table(rows)])
        whole = len(table) // BLOCK
        self._pending = table[whole * BLOCK :]
        if not whole:
            return []
        cube = table[: whole * BLOCK].reshape(whole, BLOCK, _COLUMNS)
        losses, norms = (median(cube[:, :, column]) for column in (_LOSS, _NORM))
        coefficients = median(cube[:, :, _COEFFICIENT])
        rates = cube[:, -1, _RATE].tolist()
        clipped = cube[:, :, _CLIPPED].sum(axis=1).tolist()
        blocks = []
        for index in range(whole):
            self._position += BLOCK
            part = cube[index]
            blocks.append(
                Block(
                    step=int(part[-1, _STEP]),
                    time=float(part[-1, _TIME]),
                    first_step=int(part[0, _STEP]),
                    position=self._position,
                    losses=_finite(part[:, _LOSS]),
                    loss=losses[index],
                    norms=_finite(part[:, _NORM]),
                    norm=norms[index],
                    rate=rates[index],
                    coefficient=coefficients[index],
                    clipped=int(clipped[index]),
                    threshold=float(part[-1, _THRESHOLD]),
                    steps=Steps(part[:, _TIME], part[:, _NORM], part[:, _CLIPPED] > 0, part[:, _NONFINITE] > 0),
                )
            )
        return blocks

    def to_state(self) -> list[Any]:
        return [self._position, pack(self._pending)]

    @classmethod
    def from_state(cls, state: list[Any]) -> Blocks:
        self = cls()
        self._position, self._pending = int(state[0]), unpack(state[1]).reshape(-1, _COLUMNS)
        return self


def _table(rows: Rows) -> F64:
    table = np.empty((len(rows), _COLUMNS))
    table[:, _STEP], table[:, _TIME] = rows.step, rows.time
    for column, values in ((_LOSS, rows["loss"]), (_NORM, rows.norm), (_COEFFICIENT, rows["clip_coefficient"])):
        table[:, column] = np.where(np.isfinite(values), values, np.nan)
    table[:, _CLIPPED], table[:, _NONFINITE] = rows.clipped, rows.nonfinite
    table[:, _RATE], table[:, _THRESHOLD] = rates(rows), rows["clip_threshold"]
    return table


def rates(rows: Rows) -> F64:
    """The highest learning rate of a row's parameter groups, NaN where none is known."""
    which = [i for i, name in enumerate(rows.columns) if name.startswith("lr_")]
    if not which:
        return np.full(len(rows), np.nan)
    rates = np.where(np.isfinite(rows.values[:, which]), rows.values[:, which], -np.inf).max(axis=1)
    return np.where(np.isfinite(rates), rates, np.nan)


def median(table: F64) -> list[float]:
    """The median of each row's values that are not NaN; NaN of a row without any."""
    ordered = np.sort(table, axis=1)
    count = (~np.isnan(table)).sum(axis=1)
    at = np.arange(len(table))
    middle = (
        ordered[at, np.maximum(0, (count - 1) // 2)] / 2 + ordered[at, np.minimum(count // 2, table.shape[1] - 1)] / 2
    )
    return np.where(count > 0, middle, np.nan).tolist()  # type: ignore[no-any-return]


def _finite(values: F64) -> F64:
    return values[~np.isnan(values)]


def error_of_median(values: F64) -> float:
    """Standard error of the median of some values, whatever their distribution.

    It is 1 / (2 f √n), with the density f at the median: a fifth of the values
    lies between their quantiles 0.4 and 0.6.
    """
    low, high = np.quantile(values, (0.4, 0.6))
    return float(high - low) / (0.4 * math.sqrt(len(values)))


class Reference:
    """A robust running baseline: the last accepted values of a curve, in blocks.

    Whoever uses it decides what is accepted; what is not finite and what was
    an outlier never is. It stands for "the past" of :class:`Tail`.
    """

    def __init__(self, size: int, values: Iterable[float] = ()) -> None:
        self._size = size
        self._values: F64 = np.array(list(values))
        self._tail: Tail | None = None

    def __len__(self) -> int:
        return len(self._values)

    def accept(self, values: F64) -> None:
        self._values = np.concatenate([self._values, values])[-self._size :]
        self._tail = None

    def clear(self) -> None:
        self._values, self._tail = np.empty(0), None

    @property
    def tail(self) -> Tail:
        """Where the accepted values lie; ask only when there are any."""
        if self._tail is None:
            ordered = np.sort(self._values)
            median_ = float(ordered[len(ordered) // 2])
            quantile = float(ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))])
            above = ordered[ordered > quantile]
            excess = float((above - quantile).mean()) if len(above) else 0.0
            error = error_of_median(ordered) * math.sqrt(len(ordered))
            self._tail = Tail(median_, quantile, excess, float(ordered[-1]), error)
        return self._tail

    @property
    def negative(self) -> float:
        """Share of accepted values below zero; ask only when there are any."""
        return float((self._values < 0).mean())

    def to_state(self) -> str:
        return pack(self._values)

    def restore(self, state: str) -> None:
        self._values, self._tail = unpack(state), None


@dataclass(frozen=True, slots=True)
class Tail:
    """Where values lie: median, 90th percentile, mean excess above it, maximum; ``error`` / √n is the standard error
    of a median of n such values, whatever their distribution."""

    median: float
    q90: float
    excess: float
    largest: float
    error: float
