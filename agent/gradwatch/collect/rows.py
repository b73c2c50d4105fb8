"""Rows of ``steps.ring`` with what follows from them: which are steps, which were clipped, which are broken."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from gradwatch.journal import StepRows

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

#: Bits of the column ``flags`` (see ``docs/journal.md``).
SKIPPED: Final = 1
CLIPPED_BY_NORM: Final = 4
CLIPPED_IN_PARTS: Final = 64
UNSCALED_BY_PROBE: Final = 128
REPLAYED: Final = 256
#: No training takes more steps than this; a row that says so is garbage.
MOST_STEPS: Final = 2**53


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of one rank, each an attempted step of one optimizer.

    Columns come by name; one that this journal lacks is NaN throughout. Values
    are as written, so of code that nobody reviewed: whoever uses them as an
    index or a sum looks first.
    """

    columns: tuple[str, ...]
    sequence: I64
    step: I64
    time: F64
    values: F64
    #: Whether this rank holds shards: its own L2 norm is then not the global one.
    sharded: bool = False

    @classmethod
    def of(cls, rows: StepRows, sharded: bool = False) -> Rows:
        return cls(rows.columns, rows.sequence.astype(np.int64), rows.step, rows.time, rows.values, sharded)

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, name: str) -> F64:
        try:
            return self.values[:, self.columns.index(name)]
        except ValueError:
            return np.full(len(self), np.nan)

    def take(self, which: slice | Mask | I64) -> Rows:
        """Some of the rows, in their order."""
        return replace(
            self,
            sequence=self.sequence[which],
            step=self.step[which],
            time=self.time[which],
            values=self.values[which],
        )

    def followed_by(self, others: Rows) -> Rows:
        if not len(self):
            return others
        if not len(others):
            return self
        return replace(
            self,
            sequence=np.concatenate([self.sequence, others.sequence]),
            step=np.concatenate([self.step, others.step]),
            time=np.concatenate([self.time, others.time]),
            values=np.concatenate([self.values, others.values]),
        )

    def with_column(self, name: str, column: F64) -> Rows:
        """The rows with another column of that name, where this journal has one."""
        if name not in self.columns:
            return self
        values = self.values.copy()
        values[:, self.columns.index(name)] = column
        return replace(self, values=values)

    # -- what follows from the columns

    @cached_property
    def plausible(self) -> Mask:
        """Rows that an optimizer can have written: a step number and a time that are such."""
        known = np.isfinite(self.time) & (self.time > 0) & (self.time < 1e12)
        return known & (self.step >= 0) & (self.step < MOST_STEPS)

    @cached_property
    def optimizer(self) -> I64:
        """Index into the manifest's optimizers; 0 where the row does not say."""
        return _whole(self["optimizer"], 0)

    @cached_property
    def flags(self) -> I64:
        return _whole(self["flags"], 0)

    @cached_property
    def taken(self) -> Mask:
        """Rows that are steps; the others a GradScaler skipped."""
        taken: Mask = ((self.flags & SKIPPED) == 0) & ~(self["found_inf"] > 0)
        return taken

    @cached_property
    def measured(self) -> Mask:
        """Rows whose device columns have arrived."""
        return ~np.isnan(self["nonfinite"]) if "nonfinite" in self.columns else np.ones(len(self), np.bool_)

    @cached_property
    def norm(self) -> F64:
        """Pre-clip, unscaled global norm that training used; the wide L2 norm where nothing computed one, but not
        that of a shard."""
        used = self["grad_norm"]
        return used if self.sharded else np.where(np.isnan(used) & ~self.broken, self["grad_norm_l2"], used)

    @cached_property
    def broken(self) -> Mask:
        """Rows with a tensor whose gradient holds NaN or infinity."""
        return self["nonfinite"] > 0

    @cached_property
    def nonfinite(self) -> Mask:
        """Steps that were taken with such a gradient."""
        nonfinite: Mask = self.broken & self.taken
        return nonfinite

    @cached_property
    def clipped(self) -> Mask:
        """Steps whose pre-clip norm was above the threshold.

        Where a clip saw scaled gradients or a part of the parameters, the
        row's norm is not what it compared: there its coefficient decides. A
        gradient that is not finite is not clipped, it is broken.
        """
        threshold = self["clip_threshold"]
        other = (self.flags & (CLIPPED_IN_PARTS | UNSCALED_BY_PROBE)) != 0
        above: Mask = np.where(other, self["clip_coefficient"] < 1.0, self.norm > threshold)
        clipped: Mask = above & self.taken & ~self.broken & np.isfinite(threshold)
        return clipped

    @cached_property
    def bad_loss(self) -> Mask:
        """Rows whose logged loss is NaN or infinite.

        NaN in the column stands for "not logged" too; a NaN that was logged is
        told by its sign bit, or by gradients that are broken with it.
        """
        loss = self["loss"]
        return np.isinf(loss) | (np.isnan(loss) & np.signbit(loss))


def _whole(column: F64, otherwise: int) -> I64:
    sane = np.isfinite(column) & (np.abs(column) < 2**31)
    return np.where(sane, column, otherwise).astype(np.int64)
