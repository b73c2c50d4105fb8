"""Samples: weight norms, update ratios, histograms and optimizer state, at a few steps only.

What needs extra work is done at steps 0, 1, 2, 4, … 64 and then every 100. The
update is a real difference, ``Δw = w_before − w_after`` around the step, and
so true for every optimizer; its copies are bounded in bytes, and where a model
is larger, tensors take turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from gradwatch.journal.manifest import Section
from gradwatch.probe.norms import l2_norms, local, stack

#: Bytes of weights copied around one sampled step.
COPY_BYTES: Final = 64 * 2**20
#: Steps between samples, once a run is under way.
EVERY: Final = 100
#: Buckets of the weight histogram, each a factor of four wide, from 4**-12 to 4**8.
BUCKETS: Final = 20
_LOWEST: Final = -12
GLOBAL: Final = 8


def is_sampled(step: int) -> bool:
    """Whether a step is sampled: 0, the powers of two up to 64, then every hundredth."""
    if step <= 64:
        return step & (step - 1) == 0
    return step % EVERY == 0


def sections(tensors: int, histograms: bool) -> tuple[Section, ...]:
    """The sections of a row of ``samples.ring`` for a number of tensors (see ``docs/journal.md``)."""
    sizes = {"global": GLOBAL, "weight_norm": tensors, "update_norm": tensors, "state_norm": 2 * tensors}
    if histograms:
        sizes["histogram"] = tensors * BUCKETS
    result, offset = [], 0
    for name, size in sizes.items():
        result.append(Section(name, offset, size))
        offset += size
    return tuple(result)


def histogram(weights: Tensor) -> Tensor:
    """Counts of ``|w|`` in :data:`BUCKETS` buckets by ``floor(log4 |w|)``; zeros count in the first one.

    Stays on the device: bounds are given, so nothing is looked at to find them.
    """
    exponent = torch.log2(weights.detach().reshape(-1).abs().float()).mul_(0.5)
    top = _LOWEST + BUCKETS
    return torch.histc(exponent.clamp_(_LOWEST, top - 1e-3), bins=BUCKETS, min=_LOWEST, max=top)


class Sample:
    """One sampled step under way: weights copied before it, compared behind it.

    ``chosen`` are the parameters whose update is measured, at the positions
    ``at`` of the run's tensors; weight norms are taken of all ``parameters``.
    """

    def __init__(
        self, parameters: Sequence[Tensor], positions: Sequence[int], state: Any, first: int, histograms: bool
    ) -> None:
        locals_ = [local(p) for p in parameters]
        chosen, used = [], 0
        for turn in range(len(locals_)):
            index = (first + turn) % len(locals_)
            size = locals_[index].numel() * locals_[index].element_size()
            if used + size > COPY_BYTES:
                break
            used += size
            chosen.append(index)
        #: Where the next sample takes up, when tensors take turns.
        self.next_first = (first + len(chosen)) % len(locals_) if locals_ and chosen else first + 1
        self.whole = len(chosen) == len(locals_)
        self._positions = [positions[i] for i in range(len(locals_))]
        self._chosen = chosen
        self._weights = [locals_[i] for i in chosen]
        self._parameters = list(parameters)
        self._state = state
        self._histograms = histograms
        self.weight_norms = stack(l2_norms(locals_)) if locals_ else None
        self._before = [torch.empty_like(w) for w in self._weights]
        if self._before:
            torch._foreach_copy_(self._before, self._weights)

    def finish(self, tensors: int, optimizer: int, spare: Sequence[Tensor]) -> list[tuple[Any, Tensor]]:
        """Behind the step: (columns of the sample's row, device values) for all that was measured."""
        parts: list[tuple[Any, Tensor]] = []
        if self.weight_norms is None:
            return parts
        at = self._positions
        layout = {s.name: s.offset for s in sections(tensors, True)}
        # NaN says "not part of this sample": weights that hold NaN or infinity have an infinite norm.
        weight = self.weight_norms.float().nan_to_num(nan=math.inf, posinf=math.inf)
        parts.append(([layout["weight_norm"] + c for c in at], weight))
        device = weight.device
        total_weight = torch.linalg.vector_norm(weight)
        nan = total_weight * float("nan")
        total_update = nan
        if self._before:
            torch._foreach_sub_(self._before, self._weights)
            update = stack(l2_norms(self._before)).float()
            parts.append(([layout["update_norm"] + at[i] for i in self._chosen], update))
            if self.whole:
                total_update = torch.linalg.vector_norm(update).to(device)
        state_columns, state_norms = self._state_norms(layout["state_norm"], at)
        total_state = nan
        if state_norms is not None:
            parts.append((state_columns, state_norms))
            total_state = torch.linalg.vector_norm(state_norms).to(device)
        if self._histograms:
            for index in self._chosen:
                begin = layout["histogram"] + at[index] * BUCKETS
                parts.append((range(begin, begin + BUCKETS), histogram(local(self._parameters[index]))))
        scalars = [total_weight, total_update, total_update / total_weight, total_state]
        parts.append((range(1, 5), torch.stack([s.float() for s in scalars])))
        for column, value in zip((5, 6), spare):
            parts.append((range(column, column + 1), value.detach().float().reshape(1)))
        return parts

    def _state_norms(self, offset: int, at: Sequence[int]) -> tuple[list[int], Tensor | None]:
        columns: list[int] = []
        tensors: list[Tensor] = []
        for index, parameter in enumerate(self._parameters):
            state = self._state.get(parameter)
            if not state:
                continue
            moments = ("exp_avg", "exp_avg_sq") if "exp_avg" in state else ("momentum_buffer", "square_avg")
            for slot, name in enumerate(moments):
                value = state.get(name)
                if isinstance(value, Tensor) and value.is_floating_point():
                    columns.append(offset + 2 * at[index] + slot)
                    tensors.append(value)
        return columns, (stack(l2_norms(tensors)).float() if tensors else None)
