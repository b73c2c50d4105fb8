"""Writes rows: takes what an attempted step was, brings its values to the host, appends to the journal.

On a CPU a row is whole when the step ends. On an accelerator its host columns
are written at once; the device values leave together, when nothing more can
join them (the loss is often logged behind the step), and the second part of
the row is written when they have landed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter, time
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradwatch.journal import JournalWriter
from gradwatch.probe import columns as col
from gradwatch.probe.attempted import EPSILON, Attempted, Clip, clip_columns, derive
from gradwatch.probe.lane import Lane, Values, gather, on_host

#: Tensors up to which a list of numbers is cheaper than an array.
FEW: Final = 64
#: A norm this far from the true one takes the long way, on which the contract looks at it.
NOTEWORTHY: Final = 0.01

Number = float | int | Tensor | None


@dataclass(slots=True)
class Row:
    """A row under way: the raw values from which its device columns derive."""

    optimizer: int
    step: int
    attempted: Attempted
    clips: list[Clip]
    loss: Number
    loss_scale: Number
    found_inf: Number
    tensor_rates: list[Tensor | float]
    sequence: int = 0
    time: float = 0.0
    #: Whether a GradScaler skipped it.
    skipped: bool = False


class Recorder:
    """The writing end of one run: rows, in order, into its journal."""

    def __init__(self, writer: JournalWriter, columns: col.StepColumns, lane: Lane, started: float) -> None:
        self._steps, self._tensors = writer.steps, writer.tensors
        self._count = len(writer.manifest.tensors)
        self._lane = lane
        #: Called with (row, norm that training used, true norm) when a row that took the long way is known.
        self.landed: Callable[[Row, float, float], None] = lambda row, used, true: None
        #: Called with (row, its device columns) behind a row with tensors that are not finite.
        self.broken: Callable[[Row, list[float]], None] = lambda row, device: None
        self._held: Row | None = None
        self._previous = started
        self._width = len(columns.device)
        self._spare = [math.nan] * (self._width - len(col.DEVICE))
        #: Sequence number and step of the last row, 0 and -1 before the first.
        self.sequence = 0
        self.step = -1
        #: Its device columns as they were written, for a loss that comes later; empty while they are under way.
        self._device: list[float] = []
        #: The columns of the last cheap row, and where they are not in order, the place of each norm in the payload.
        self._columns: npt.NDArray[np.intp] | None = None
        self._places: npt.NDArray[np.intp] | None = None
        #: Seconds of the training thread spent since the last row; every hook adds to it.
        self.spent = 0.0

    def write_plain(self, step: int, host: list[float], attempted: Attempted, loss: float) -> bool:
        """Write the common row at its cheapest, or return False and write nothing.

        That is: on the CPU, every tensor has a gradient, and one clip of all of
        them, or one measurement and no clip. ``host`` is filled up and packed at
        once, so the caller may use the list again.
        """
        clips, measured = attempted.clips, attempted.measured
        if measured is None:
            if len(clips) != 1:
                return False
            clip = clips[0]
            if not clip.plain:
                return False
            columns, norms, total = clip.columns, clip.norms, clip.total.item()  # type: ignore[union-attr]
            l2 = total if clip.total_is_l2 else torch.linalg.vector_norm(norms).item()  # type: ignore[arg-type]
            max_norm = clip.max_norm
            host[5] += col.CLIPPED_BY_NORM
            host[6] = max_norm
            factor = max_norm / (total + EPSILON)
            if factor > 1.0:
                factor = 1.0
        else:
            columns, norms, factor = measured.columns, measured.norms, math.nan
            if clips or measured.scale is not None or not on_host(norms):
                return False
            l2 = total = torch.linalg.vector_norm(norms).item()
        count = norms.numel()  # type: ignore[union-attr]
        # A norm that is not finite takes the long way, which counts the tensors that it comes from; so do
        # several optimizers and tensors without gradient, whose columns have gaps.
        if count != self._count or not total < math.inf or not l2 < math.inf:  # type: ignore[union-attr]
            return False
        if abs(total - l2) > NOTEWORTHY * l2:
            return False
        if columns is not self._columns and not self._ordered(columns):
            return False
        if self._held is not None:
            self.flush()
        now = time()
        tick = perf_counter()
        host[2] = tick - self._previous
        host[4] = self.spent
        self._previous = tick
        self.spent = 0.0
        self._device = device = [loss, total, l2, factor, 0.0, math.nan, math.nan, *self._spare]
        self.sequence = sequence = self._steps.append(step, now, host, device)
        self.step = step
        if self._places is not None:
            self._tensors.payload[self._places] = norms.numpy()  # type: ignore[union-attr]
            self._tensors.append(sequence, step, now)
        elif count <= FEW:
            self._tensors.append_values(sequence, step, now, norms.tolist())  # type: ignore[union-attr]
        else:
            self._tensors.payload[:] = norms.numpy()  # type: ignore[union-attr]
            self._tensors.append(sequence, step, now)
        return True

    def _ordered(self, columns: npt.NDArray[np.intp]) -> bool:
        """Note how norms that come in the order of ``columns`` go into the payload; False where not one goes to each.

        Parameter groups, and loops that clip in an order of their own, give them in another order than the model.
        """
        straight = np.arange(self._count)
        if not np.array_equal(np.sort(columns), straight):
            return False
        self._columns, self._places = columns, None if np.array_equal(columns, straight) else columns
        return True

    def write(self, row: Row, host: list[float]) -> None:
        """Write a row: all of it where every value is on the host, else its first part."""
        if self._held is not None:
            self.flush()
        flags, host[6] = clip_columns(row.clips)
        host[5] = float(int(host[5]) | flags)
        row.skipped = bool(int(host[5]) & col.SKIPPED)
        row.time = time()
        tick = perf_counter()
        host[2] = tick - self._previous
        host[4] = self.spent
        self._previous = tick
        self.spent = 0.0
        tensors = _device_values(row)
        self.step = row.step
        if all(on_host(t) for t in tensors):
            self._device = self._derive(row, [t.detach().float().reshape(-1).numpy() for t in tensors])
            self.sequence = row.sequence = self._steps.append(row.step, row.time, host, self._device)
            self._tensors.append(row.sequence, row.step, row.time)
            if self._device[col.NONFINITE]:
                self.broken(row, self._device)
            return
        self._device = []
        self.sequence = row.sequence = self._steps.append(row.step, row.time, host, None)
        self._held = row
        self._lane.poll()

    def add_loss(self, loss: Number) -> None:
        """Add a loss to the last row, logged behind its step."""
        held = self._held
        if held is not None:
            held.loss = loss
            self.flush()
        elif isinstance(loss, Tensor) and not on_host(loss):
            # A second loss for a row whose values have left already: it follows them, in order.
            sequence = self.sequence
            self._lane.send(gather([loss]), lambda values: self._complete_loss(sequence, logged(float(values[0]))))
        else:
            self._complete_loss(self.sequence, logged(loss))

    def _complete_loss(self, sequence: int, loss: float) -> None:
        if sequence == self.sequence and self._device:
            self._device[col.LOSS] = loss
            self._steps.complete(sequence, self._device)

    def flush(self) -> None:
        """Send the device values of the row that was held back for its loss."""
        row, self._held = self._held, None
        if row is None:
            return
        tensors = _device_values(row)
        sizes = [t.numel() for t in tensors]

        def landed(values: Values) -> None:
            parts = np.split(values, np.cumsum(sizes)[:-1]) if sizes else []
            device = self._derive(row, parts)
            if row.sequence == self.sequence:
                self._device = device
            self._steps.complete(row.sequence, device)
            self._tensors.append(row.sequence, row.step, row.time)
            if device[col.NONFINITE]:
                self.broken(row, device)

        self._lane.send(gather(tensors), landed)

    def _derive(self, row: Row, values: list[Values]) -> list[float]:
        """A row's device columns from values that are on the host now; fills in the tensors' norms."""
        landed = iter(values)

        def number(value: Number, default: float) -> float:
            if value is None:
                return default
            return float(next(landed)[0]) if isinstance(value, Tensor) else float(value)

        loss = math.nan if row.loss is None else logged(number(row.loss, math.nan))
        loss_scale = number(row.loss_scale, math.nan)
        found_inf = number(row.found_inf, math.nan)
        rates = [number(rate, math.nan) for rate in row.tensor_rates]
        totals, norms, scales = [], [], []
        for clip in row.clips:
            totals.append(number(clip.total, math.nan))
            scales.append(number(clip.scale, 1.0))
            norms.append(next(landed) if clip.norms is not None else None)
        measured, columns, first = None, None, False
        if row.attempted.measured is not None:
            scale = number(row.attempted.measured.scale, 1.0)
            measured, columns = next(landed) / scale, row.attempted.measured.columns
            first = row.attempted.measured.first
        outcome = derive(row.clips, totals, norms, scales, measured, columns, self._tensors.payload, first)
        self.landed(row, outcome.grad_norm, outcome.grad_norm_l2)
        numbers = [outcome.grad_norm, outcome.grad_norm_l2, outcome.clip_coefficient, float(outcome.nonfinite)]
        device = [loss, *numbers, loss_scale, found_inf, *rates]
        return device + [math.nan] * (self._width - len(device))

    def drain(self, seconds: float) -> None:
        """At the end of a run: take in what is still under way, for at most ``seconds``.

        Where the device is lost, what had arrived before is taken in, and its error raised.
        """
        try:
            self.flush()
            until = perf_counter() + seconds
            self._lane.poll()
            while self._lane.in_flight and perf_counter() < until:
                self._lane.poll()
        except Exception:
            self._lane.salvage()
            raise


def logged(loss: Number) -> float:
    """A loss as its column holds it: one that was logged and is NaN has its sign bit set."""
    if loss is None:
        return math.nan
    value = float(loss)
    return col.LOGGED_NAN if math.isnan(value) else value


def _device_values(row: Row) -> list[Tensor]:
    """The tensors of a row, in the order in which ``Recorder._derive`` takes them up."""
    values: list[Number] = [row.loss, row.loss_scale, row.found_inf, *row.tensor_rates]
    for clip in row.clips:
        values += [clip.total, clip.scale, clip.norms]
    if row.attempted.measured is not None:
        values += [row.attempted.measured.scale, row.attempted.measured.norms]
    return [value for value in values if isinstance(value, Tensor)]
