"""Per-layer norms under a fixed set of names: the largest layers, and ``other`` for the rest.

The norm of a layer is the root of the sum of the squares of its tensors'
norms. Which layers have a name of their own is settled at the first look, by
parameter count, and never changes in a run, so that a series is one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradwatch.collect.model import LayerTable
from gradwatch.collect.packed import pack, unpack
from gradwatch.collect.rows import F64, I64
from gradwatch.journal import PayloadRows
from gradwatch.journal.manifest import Manifest, Tensor

TOP: Final = 20
OTHER: Final = "other"


def choose(tensors: Sequence[Tensor], top: int = TOP) -> list[str]:
    """The ``top`` layers with the most parameters, largest first, by name where equal."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        name = tensor.layer or tensor.name
        sizes[name] = sizes.get(name, 0) + tensor.numel
    ranked = sorted(sizes, key=lambda name: (-sizes[name], name))
    return [name for name in ranked if name != OTHER][:top]


class Layers:
    """What is known of each tensor of one rank, and of the layers that they form."""

    def __init__(self, manifest: Manifest, names: list[str] | None = None) -> None:
        self.tensors = manifest.tensors
        self.names = choose(manifest.tensors) if names is None else names
        index = {name: i for i, name in enumerate(self.names)}
        count = len(manifest.tensors)
        self._layer: I64 = np.array(
            [index.get(t.layer or t.name, len(self.names)) for t in manifest.tensors], dtype=np.int64
        )
        self._optimizer: I64 = np.array([t.optimizer for t in manifest.tensors], dtype=np.int64)
        self._sections = {section.name: section for section in manifest.sections}
        self.grad_norm: F64 = np.full(count, np.nan)
        self.weight_norm: F64 = np.full(count, np.nan)
        self.update_norm: F64 = np.full(count, np.nan)
        #: optimizer index -> (weight norm, update ratio) of its last sample.
        self.sampled: dict[int, tuple[float, float]] = {}

    def add_gradients(self, rows: PayloadRows) -> None:
        """Keep each tensor's last gradient norm; the last row of each optimizer decides."""
        wanted = set(self._optimizer.tolist())
        for index in range(len(rows) - 1, -1, -1):
            if not wanted:
                return
            values = rows.values[index].astype(np.float64)
            measured = np.flatnonzero(~np.isnan(values))
            if not len(measured):
                continue
            optimizer = int(self._optimizer[measured[0]])
            if optimizer in wanted:
                wanted.discard(optimizer)
                own = self._optimizer == optimizer
                self.grad_norm[own] = values[own]

    def add_samples(self, rows: PayloadRows, attempt: int) -> list[LayerTable]:
        """Take in samples; return a table of tensors for each."""
        tables = []
        for index in range(len(rows)):
            values = rows.values[index].astype(np.float64)
            weight, update = self._section(values, "weight_norm"), self._section(values, "update_norm")
            overall = self._section(values, "global")
            if weight is None or update is None or overall is None or len(overall) < 4:
                continue
            seen = ~np.isnan(weight)
            self.weight_norm[seen] = weight[seen]
            seen = ~np.isnan(update)
            self.update_norm[seen] = update[seen]
            if np.isfinite(overall[0]) and 0 <= overall[0] < 256:
                self.sampled[int(overall[0])] = (float(overall[1]), float(overall[3]))
            tables.append(
                LayerTable(
                    step=int(rows.step[index]),
                    attempt=attempt,
                    time=float(rows.time[index]),
                    names=[tensor.name for tensor in self.tensors],
                    grad_norm=self.grad_norm.tolist(),
                    weight_norm=weight.tolist(),
                    update_ratio=_ratio(update, weight).tolist(),
                )
            )
        return tables

    def _section(self, values: F64, name: str) -> F64 | None:
        section = self._sections.get(name)
        expected = len(self.tensors) if name != "global" else None
        if section is None or (expected is not None and section.size != expected):
            return None
        return values[section.offset : section.offset + section.size]

    # -- what the layers are

    def grad_norms(self) -> dict[str, float]:
        return self._by_layer(self.grad_norm)

    def weight_norms(self) -> dict[str, float]:
        return self._by_layer(self.weight_norm)

    def update_ratios(self) -> dict[str, float]:
        """Norm of the update over norm of the weights, where both are known of the same tensors."""
        both = ~np.isnan(self.update_norm) & ~np.isnan(self.weight_norm)
        update = self._by_layer(np.where(both, self.update_norm, np.nan))
        weight = self._by_layer(np.where(both, self.weight_norm, np.nan))
        return {name: value / weight[name] for name, value in update.items() if weight.get(name, 0.0) > 0}

    def _by_layer(self, norms: F64) -> dict[str, float]:
        known = ~np.isnan(norms)
        if not known.any():
            return {}
        which = self._layer[known]
        squares = np.bincount(which, norms[known] ** 2, minlength=len(self.names) + 1)
        present = np.bincount(which, minlength=len(self.names) + 1) > 0
        labels = [*self.names, OTHER]
        return {labels[i]: float(np.sqrt(squares[i])) for i in np.flatnonzero(present)}

    def to_state(self) -> dict[str, Any]:
        return {
            "names": self.names,
            "grad": pack(self.grad_norm),
            "weight": pack(self.weight_norm),
            "update": pack(self.update_norm),
            "sampled": [[index, *values] for index, values in self.sampled.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        arrays = [unpack(state[key]) for key in ("grad", "weight", "update")]
        if any(len(array) != len(self.tensors) for array in arrays):
            raise ValueError("layers of another manifest")
        self.grad_norm, self.weight_norm, self.update_norm = arrays
        self.sampled = {int(i): (float(w), float(r)) for i, w, r in state["sampled"]}


def _ratio(update: F64, weight: F64) -> npt.NDArray[np.float64]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(weight > 0, update / weight, np.nan)
