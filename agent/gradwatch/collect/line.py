"""The line in which rows wait until nothing more can be added to them.

An accelerator's values arrive behind their row, and a loss may be logged
behind its step. A row is **counted** when its device columns are there: its
norm is then known. It is **final** when moreover a newer row exists or the
writer is gone: its loss is known too. Both happen in order and once, whatever
the polls brought together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from gradwatch.collect.rows import CLIPPED_IN_PARTS, F64, Mask, Rows

#: A row whose values are missing this many rows later never gets them (the reader looks no longer).
PATIENCE: Final = 64


@dataclass(frozen=True, slots=True)
class Progress:
    """What one poll added: rows that count now, and rows (counted earlier or now) that are final now."""

    counted: Rows
    final: Rows


class Line:
    """Rows of one attempt of one rank, on their way from the reader to the folds.

    ``counted`` is the sequence number up to which rows were counted. The
    reader's cursor is kept at the first row that is not final
    (:attr:`first_open`), so that after a restart the open rows are read again,
    as they are by then, and the counted ones are not counted twice.
    """

    def __init__(self, counted: int = 0) -> None:
        self.counted = counted
        #: Where ranks hold shards: the global norm of a row, None while another rank's part is missing.
        self.global_norm: Callable[[int], float | None] | None = None
        self._open: Rows | None = None

    @property
    def first_open(self) -> int | None:
        """Sequence number of the first row that is not final; None where all are."""
        return int(self._open.sequence[0]) if self._open is not None and len(self._open) else None

    @property
    def newest(self) -> Rows | None:
        """The newest row, counted or not; None where all are final."""
        return self._open.take(slice(-1, None)) if self._open is not None and len(self._open) else None

    def feed(self, rows: Rows, amended: Rows, closed: bool = False) -> Progress:
        """Take in what a poll brought; ``closed`` says that the writer is gone and this is all."""
        line = rows if self._open is None else _amend(self._open, amended).followed_by(rows)
        line, measured = self._join(line)
        total = len(line)
        if closed:
            counted = total
        else:
            waiting = np.flatnonzero(~measured)
            waiting = waiting[waiting >= total - PATIENCE]
            counted = int(waiting[0]) if len(waiting) else total
        final = total if closed else max(0, min(counted, total - 1))
        begin = int(np.searchsorted(line.sequence, self.counted, side="right"))
        progress = Progress(line.take(slice(min(begin, counted), counted)), line.take(slice(0, final)))
        if counted > begin:
            self.counted = int(line.sequence[counted - 1])
        self._open = line.take(slice(final, None))
        return progress

    def _join(self, line: Rows) -> tuple[Rows, Mask]:
        """The line with the global norms that are known, and which rows have all their values."""
        if self.global_norm is None or not len(line):
            return line, line.measured
        norm = line["grad_norm"].copy()
        for index in np.flatnonzero(np.isnan(norm)).tolist():
            known = self.global_norm(int(line.sequence[index]))
            norm[index] = np.nan if known is None else known
        joined = line.with_column("grad_norm", norm).with_column("clip_coefficient", _coefficient(line, norm))
        return joined, joined.measured & ~np.isnan(norm)


def _coefficient(line: Rows, norm: F64) -> F64:
    """Clip coefficients; where no rank could know its own, from the norm of all: min(1, max_norm / (norm + 1e-6))."""
    own, threshold = line["clip_coefficient"], line["clip_threshold"]
    whole = (line.flags & CLIPPED_IN_PARTS) == 0
    with np.errstate(invalid="ignore"):
        joint = np.minimum(1.0, threshold / (norm + 1e-6))
    return np.where(np.isnan(own) & whole, joint, own)


def _amend(line: Rows, amended: Rows) -> Rows:
    """The line with the newer version of each amended row that stands in it."""
    if not len(amended) or not len(line):
        return line
    at = np.searchsorted(line.sequence, amended.sequence)
    here = (at < len(line)) & (line.sequence[np.minimum(at, len(line) - 1)] == amended.sequence)
    values = line.values.copy()
    values[at[here]] = amended.values[here]
    return replace(line, values=values)
