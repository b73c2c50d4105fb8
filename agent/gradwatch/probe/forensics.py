"""When a gradient is first not finite: which tensor, which layer, and what the norms did before, written down at once.

The values are on the host already, as the row that they belong to: on a CPU when
the step ends, on an accelerator when its device columns have landed. What came
before is read back from the rings, so that a healthy step pays nothing for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from gradwatch.journal import JournalWriter
from gradwatch.probe import columns as col
from gradwatch.probe.recorder import Row

#: Steps before the broken one that are told.
STEPS: Final = 32
#: Broken tensors that are named.
NAMED: Final = 8
#: Steps after which another broken one is a new occurrence, and occurrences that a run tells.
CALM: Final = 100
MOST: Final = 16


class Forensics:
    """Writes the event ``nonfinite`` at the first broken step, and again after a hundred clean ones."""

    def __init__(self, writer: JournalWriter, event: Callable[..., None]) -> None:
        self._writer, self._event = writer, event
        self._last: dict[int, int] = {}
        self._told = 0

    def note(self, row: Row, device: list[float]) -> None:
        """A row with broken tensors is on the host, as the last one of the rings of its kind."""
        if row.skipped or device[col.FOUND_INF] > 0:
            return  # a GradScaler's search for its scale
        last = self._last.get(row.optimizer)
        self._last[row.optimizer] = row.step
        if self._told >= MOST or (last is not None and row.step - last <= CALM):
            return
        self._told += 1
        tensors = self._writer.manifest.tensors
        # Backward goes from the output to the input: the last tensor of the model is the first to break.
        broken = np.flatnonzero(np.isinf(self._writer.tensors.payload))[::-1]
        first = tensors[int(broken[0])] if len(broken) else None
        self._event(
            "nonfinite",
            step=row.step,
            row=row.sequence,
            rank=self._writer.manifest.rank,
            optimizer=self._writer.manifest.optimizers[row.optimizer].name,
            tensor=first.name if first is not None else "",
            layer=first.layer if first is not None else "",
            broken=len(broken),
            tensors=len(tensors),
            names=[tensors[int(index)].name for index in broken[:NAMED]],
            loss=_number(device[col.LOSS]),
            norms=self._before(row, int(broken[0]) if len(broken) else -1),
        )

    def _before(self, row: Row, column: int) -> dict[str, list[Any]]:
        """Steps before a row: their numbers, losses, pre-clip global norms, and the norms of the broken tensor."""
        steps, tensors = self._writer.steps, self._writer.tensors
        own: dict[int, float] = {}
        for sequence in range(tensors.sequence - 1, max(0, tensors.sequence - 1 - STEPS), -1):
            found = tensors.read_back(sequence)
            if found is not None and column >= 0:
                own[found[0]] = float(found[1][column])
        told: list[tuple[int, float, float, float]] = []
        for sequence in range(row.sequence - 1, max(0, row.sequence - 1 - STEPS), -1):
            values = steps.read_back(sequence)
            if values is not None and values[1][0] == row.optimizer:
                step, _, device = values
                told.append((step, device[col.LOSS], device[col.GRAD_NORM], own.get(sequence, math.nan)))
        told.reverse()
        columns = [list(column) for column in zip(*told)] or [[], [], [], []]
        names = ("step", "loss", "grad_norm", "tensor")
        return {name: [_number(value) for value in values] for name, values in zip(names, columns)}


def _number(value: float) -> float | str | None:
    """A number as an event tells it: NaN that means "not known" is null, one that was logged is a word."""
    if isinstance(value, int) or math.isfinite(value):
        return value
    if math.isnan(value):
        return "nan" if math.copysign(1.0, value) < 0 else None
    return "inf" if value > 0 else "-inf"
