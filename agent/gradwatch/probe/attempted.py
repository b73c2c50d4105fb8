"""One attempted step of one optimizer: what was clipped, what was measured, and what a row says of it.

An attempted step begins behind the former one and ends with ``optimizer.step``
or with the scaler's decision to skip it. Clips belong to it, whichever
micro-batch they came after; a clip with ``max_norm=inf`` is a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gradwatch.probe import columns as col

#: torch's clip divides by the norm plus this (torch.nn.utils.clip_grad).
EPSILON = 1e-6


@dataclass(slots=True)
class Clip:
    """A clip by norm as seen: which columns, their norms before it, and the total that it used."""

    columns: npt.NDArray[np.intp]
    #: Whether it covered every parameter of the optimizer.
    whole: bool
    #: L2 norms aligned with ``columns``, before the clip; None where nobody computed them.
    norms: Tensor | None
    total: Tensor | float
    max_norm: float
    norm_type: float
    #: Whether ``total`` is the L2 norm of ``norms`` to the last bit, so that it need not be combined again.
    total_is_l2: bool
    #: Backward passes seen before it in this attempted step.
    backwards: int
    #: What the gradients had been multiplied with when it ran (a loss scale not yet divided out), else None.
    scale: Tensor | float | None = None
    #: Reported by ``log_clip``, not seen.
    logged: bool = False
    #: Whether it covered the parameter whose backward passes are counted: only then its place among them is known.
    watched: bool = False
    #: On the CPU, of every parameter, below infinity, by the L2 norm, its own norms known: little to work out.
    plain: bool = False


@dataclass(slots=True)
class Measured:
    """Norms measured at the step, of the gradients as the optimizer uses them."""

    columns: npt.NDArray[np.intp]
    norms: Tensor
    #: What the gradients were still multiplied with (fused optimizers unscale inside), else None.
    scale: Tensor | float | None = None


@dataclass(slots=True)
class Attempted:
    """What has been seen since the optimizer's former step."""

    clips: list[Clip] = field(default_factory=list)
    value_threshold: float = math.nan
    backwards: int = 0
    measured: Measured | None = None
    #: Measurements of optimizers that are stepped one after the other, joined when the last has stepped.
    parts: list[Measured] = field(default_factory=list)
    flags: int = 0

    def clear(self) -> None:
        """Begin the next attempted step."""
        self.clips.clear()
        self.value_threshold = math.nan
        self.backwards = 0
        self.measured = None
        self.parts.clear()
        self.flags = 0

    def join_parts(self) -> None:
        """Make one measurement of those of the parts."""
        if self.parts:
            columns = np.concatenate([part.columns for part in self.parts])
            device = self.parts[0].norms.device
            norms = torch.cat([part.norms.float().to(device, non_blocking=True) for part in self.parts])
            self.measured = Measured(columns, norms, self.parts[0].scale)
            self.parts = []

    def effective_clips(self) -> list[Clip]:
        """The clips behind the last backward pass: what came before it clipped other gradients."""
        backwards = self.backwards
        return [clip for clip in self.clips if clip.backwards == backwards or not clip.watched]


@dataclass(slots=True)
class Outcome:
    """Numbers of a row that derive from the gradients, all of this rank."""

    grad_norm: float = math.nan
    grad_norm_l2: float = math.nan
    clip_coefficient: float = math.nan
    nonfinite: int = 0


def coefficient(total: float, max_norm: float) -> float:
    """Factor that torch's clip multiplies gradients with: ``min(1, max_norm / (total + 1e-6))``.

    NaN for a NaN total, as the gradients are NaN then too; 0 for an infinite one.
    """
    if math.isnan(total):
        return math.nan
    return min(1.0, max_norm / (total + EPSILON))


def clip_columns(clips: list[Clip]) -> tuple[int, float]:
    """The flags and the threshold of a row, which are known on the host.

    Of several thresholds the smallest is the row's. A clip of gradients that
    were still multiplied with a loss scale counts with its threshold as given.
    """
    binding = [clip for clip in clips if math.isfinite(clip.max_norm)]
    if not binding:
        return 0, math.nan
    flags = col.CLIPPED_BY_NORM
    if any(clip.logged for clip in binding):
        flags |= col.LOGGED_CLIP
    if any(clip.scale is not None for clip in binding):
        flags |= col.UNSCALED_HERE
    if any(not clip.whole for clip in binding):
        flags |= col.CLIPPED_IN_PARTS
    return flags, min(clip.max_norm for clip in binding)


def derive(
    clips: list[Clip],
    totals: list[float],
    norms: list[npt.NDArray[Any] | None],
    scales: list[float],
    measured: npt.NDArray[Any] | None,
    columns: npt.NDArray[np.intp] | None,
    payload: npt.NDArray[np.float32],
) -> Outcome:
    """Work out a row's numbers from values that are on the host now, and fill ``payload`` with tensors' norms.

    ``totals``, ``norms`` and ``scales`` belong to ``clips`` one by one (scale 1
    where gradients were unscaled); ``measured`` are norms taken at the step,
    behind every clip. Several clips: one that covers columns which a former
    one covered clipped them again, so their coefficients multiply and the
    norms of the first are the pre-clip ones; clips of different parts combine
    as the root of the sum of squares.
    """
    outcome = Outcome()
    before = np.zeros(len(payload))
    seen = np.zeros(len(payload), dtype=np.bool_)
    factor = np.ones(len(payload))
    squares = 0.0
    bound: float | None = None
    for clip, total, values, scale in zip(clips, totals, norms, scales):
        at = clip.columns[clip.columns >= 0]
        again = len(at) > 0 and bool(seen[at].all())
        if values is not None and not again:
            before[at] = np.asarray(values, dtype=np.float64)[clip.columns >= 0] / scale
            seen[at] = True
        if math.isfinite(clip.max_norm):
            value = coefficient(total, clip.max_norm)
            factor[at] *= value
            if bound is None or value < bound or math.isnan(value):
                bound = value
        if not again:
            squares += (total / scale) ** 2
    outcome.clip_coefficient = math.nan if bound is None else bound
    if measured is not None and columns is not None:
        at = columns[columns >= 0]
        missing = ~seen[at]
        # Measured behind the clips: what they put on it is divided out again.
        with np.errstate(divide="ignore", invalid="ignore"):
            values = np.asarray(measured, dtype=np.float64)[columns >= 0]
            before[at[missing]] = values[missing] / factor[at[missing]]
        seen[at] = True
    finite = np.isfinite(before)
    outcome.nonfinite = int(np.count_nonzero(seen & ~finite))
    outcome.grad_norm_l2 = math.sqrt(float(np.dot(before, before))) if seen.any() else math.nan
    outcome.grad_norm = math.sqrt(squares) if clips else outcome.grad_norm_l2
    payload[:] = np.where(seen, np.where(finite, before, np.inf), np.nan)
    return outcome
