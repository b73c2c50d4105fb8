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
from gradwatch.probe.norms import FOREIGN, UNLISTED

#: torch's clip divides by the norm plus this (torch.nn.utils.clip_grad).
EPSILON = 1e-6


@dataclass(slots=True)
class Clip:
    """A clip by norm as seen: which columns, their norms before it, and the total that it used."""

    columns: npt.NDArray[np.intp]
    #: Whether it covered every parameter of the optimizer that has a gradient.
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
    #: By a total that the loop came to by itself, as where it sums over the ranks of a pipeline.
    own_total: bool = False
    #: Whether the loop had changed the gradients by hand before it.
    touched: bool = False
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
    #: Whether it was taken before every clip (in front of a clip by value), and not at the step.
    first: bool = False


@dataclass(slots=True)
class Attempted:
    """What has been seen since the optimizer's former step."""

    clips: list[Clip] = field(default_factory=list)
    value_threshold: float = math.nan
    backwards: int = 0
    measured: Measured | None = None
    #: Measurements of optimizers that are stepped one after the other, joined when the last has stepped.
    parts: list[Measured] = field(default_factory=list)
    #: Norms of gradients that torch refused to clip since they are not finite, and raised.
    refused: Measured | None = None
    #: Whether a GradScaler steps the optimizer, which then takes the loss scale out of the gradients.
    scaler_steps: bool = False
    flags: int = 0

    def clear(self) -> None:
        """Begin the next attempted step."""
        self.clips.clear()
        self.value_threshold = math.nan
        self.backwards = 0
        self.measured = None
        self.parts.clear()
        self.refused = None
        self.scaler_steps = False
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
    if any(not clip.whole or (clip.columns == FOREIGN).any() for clip in binding):
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
    first: bool = False,
) -> Outcome:
    """Work out a row's numbers from values that are on the host now, and fill ``payload`` with tensors' norms.

    ``totals``, ``norms`` and ``scales`` belong to ``clips`` one by one (scale 1
    where gradients were unscaled); ``measured`` are norms taken at the step,
    behind every clip, or before every clip where ``first``. Several clips: one that covers columns which a former
    one covered clipped them again, so their coefficients multiply and the
    norms of the first are the pre-clip ones; clips of different parts combine
    as the root of the sum of squares.
    """
    outcome = Outcome()
    tally = _Tally(payload)
    before_clips = measured is not None and columns is not None and first
    if before_clips:
        tally.take(columns, measured, 1.0)  # type: ignore[arg-type]
    squares, joint = 0.0, False
    bounded = np.zeros(len(payload), dtype=np.bool_)
    bound: float | None = None
    for clip, total, values, scale in zip(clips, totals, norms, scales):
        at = clip.columns[clip.columns >= 0]
        new = bool((~tally.seen[at]).any()) or not len(at)
        joint |= bool((clip.columns == FOREIGN).any())
        if values is not None:
            tally.take(clip.columns, values, scale)
        if new or values is None:
            squares += (total / scale) ** 2
        if math.isfinite(clip.max_norm):
            value = coefficient(total, clip.max_norm)
            tally.factor[at] *= value
            bounded[at] = True
            bound = value if bound is None or math.isnan(value) else bound * value if not new else min(bound, value)
    if bound is not None:
        outcome.clip_coefficient = float(tally.factor[bounded].min()) if bounded.any() else bound
    if measured is not None and columns is not None and not first:
        # Measured behind the clips: what they put on it is divided out again.
        tally.take(columns, measured, 1.0)
    outcome.nonfinite = tally.nonfinite
    outcome.grad_norm_l2 = tally.l2
    # The total of a clip that covered parameters of others too is not this optimizer's norm.
    outcome.grad_norm = math.sqrt(squares) if clips and not joint and not before_clips else outcome.grad_norm_l2
    tally.fill(payload)
    return outcome


class _Tally:
    """Norms of one row's tensors before any clip: each is taken once, from whoever measured it first."""

    def __init__(self, payload: npt.NDArray[np.float32]) -> None:
        self.before = np.zeros(len(payload))
        self.seen = np.zeros(len(payload), dtype=np.bool_)
        #: What clips have put on each tensor so far.
        self.factor = np.ones(len(payload))
        self._rest: float | None = None

    def take(self, columns: npt.NDArray[np.intp], values: npt.NDArray[Any], scale: float) -> None:
        """Take norms in for the tensors that have none yet; those without a column count in the global norm."""
        norms = np.asarray(values, dtype=np.float64) / scale
        known = columns >= 0
        at = columns[known]
        new = ~self.seen[at]
        with np.errstate(divide="ignore", invalid="ignore"):
            self.before[at[new]] = norms[known][new] / self.factor[at[new]]
        self.seen[at] = True
        if self._rest is None and (columns == UNLISTED).any():
            self._rest = float(np.sum(norms[columns == UNLISTED] ** 2))

    @property
    def nonfinite(self) -> int:
        rest = self._rest is not None and not math.isfinite(self._rest)
        return int(np.count_nonzero(self.seen & ~np.isfinite(self.before))) + rest

    @property
    def l2(self) -> float:
        """The global L2 norm of what was taken in; NaN of nothing."""
        if not self.seen.any() and self._rest is None:
            return math.nan
        return math.sqrt(float(np.dot(self.before, self.before)) + (self._rest or 0.0))

    def fill(self, payload: npt.NDArray[np.float32]) -> None:
        """The row of ``tensors.ring``: NaN for no gradient, infinity for one that is not finite."""
        finite = np.where(np.isfinite(self.before), self.before, np.inf)
        payload[:] = np.where(self.seen, finite, np.nan)
