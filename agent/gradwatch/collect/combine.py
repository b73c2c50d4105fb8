"""The global gradient norm of a sharded model, from what each rank has written of its shards.

No rank talks to another for this: each writes the norms of what it holds, and
in its manifest how every tensor lies over the ranks. With *w* = 1 / (number of
ranks that hold the same piece of a tensor),

    norm² = Σ over ranks Σ over its tensors  w · ‖piece‖²

adds every shard once and every replica once. It holds only where every rank of
the world has been read, from the same step on: a missing or a late one gives no
number. Where ranks are on several nodes, no agent reads them all: each exports
the inner sum of its ranks, with *w* from the mesh in their manifests, and
Prometheus adds them up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from gradwatch.collect.rows import F64
from gradwatch.journal import PayloadRows
from gradwatch.journal.manifest import Manifest, Tensor

_SHARDED: Final = ("shard", "strided_shard")
#: Rows that wait for other ranks at a time.
_WAITING: Final = 1_024


def is_sharded(manifest: Manifest) -> bool:
    """Whether this rank holds only a part of some tensor."""
    return any(isinstance(tensor.placement, dict) for tensor in manifest.tensors)


def piece_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """Which piece of a tensor a rank holds: equal for replicas, different for shards; None where nobody can say.

    A partial sum over ranks has no norm of its own, and an unknown placement
    could be anything.
    """
    placement = tensor.placement
    if placement is None:
        return ()
    if not isinstance(placement, dict):
        return None
    if placement.get("kind") == "flat":
        return ("rank",)
    placements, coordinate = placement.get("placements"), placement.get("coordinate")
    if placement.get("kind") != "dtensor" or not isinstance(placements, list) or not isinstance(coordinate, list):
        return None
    if len(placements) != len(coordinate):
        return None
    piece = []
    for placed, index in zip(placements, coordinate):
        kind = placed.get("type") if isinstance(placed, dict) else None
        if kind in _SHARDED and isinstance(index, int):
            piece.append(index)
        elif kind == "replicate":
            piece.append(-1)
        else:
            return None
    return tuple(piece)


def aligned(manifests: Mapping[int, Manifest]) -> bool:
    """Whether all ranks were watched from the same step on, so that their rows are of the same steps."""
    return len({manifest.collectives for manifest in manifests.values()}) <= 1


def weights(manifests: Mapping[int, Manifest]) -> dict[int, F64] | None:
    """For each rank, the weight *w* of each of its tensors; None where some placement says nothing certain."""
    held: dict[tuple[Any, ...], int] = {}
    pieces: dict[int, list[tuple[Any, ...]]] = {}
    for rank, manifest in manifests.items():
        pieces[rank] = []
        for tensor in manifest.tensors:
            piece = piece_of(tensor)
            if piece is None:
                return None
            key = (tensor.name, rank) if piece == ("rank",) else (tensor.name, *piece)
            pieces[rank].append(key)
            held[key] = held.get(key, 0) + 1
    return {rank: np.array([1.0 / held[key] for key in keys]) for rank, keys in pieces.items()}


def shares(manifest: Manifest) -> F64 | None:
    """The weight *w* of each tensor by one rank's manifest alone; None where its meshes do not cover the whole world.

    The ranks along a replicated dimension of the mesh hold the same piece, and so does the world of a whole tensor.
    """
    found = []
    for tensor in manifest.tensors:
        if piece_of(tensor) is None:
            return None
        placement = tensor.placement
        if not isinstance(placement, dict):
            found.append(1.0 / manifest.world_size)
        elif placement.get("kind") == "flat":
            found.append(1.0)
        else:
            mesh = placement.get("mesh")
            shape = mesh.get("shape") if isinstance(mesh, dict) else None
            placed = placement["placements"]
            if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
                return None
            if len(shape) != len(placed) or math.prod(shape) != manifest.world_size:
                return None
            found.append(1.0 / math.prod(n for n, how in zip(shape, placed) if how["type"] == "replicate"))
    return np.array(found)


class GlobalNorms:
    """Joins the rows of all ranks of one attempt; every rank writes the same rows in the same order."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._weights: dict[int, F64] | None = None
        self._manifests: dict[int, Manifest] = {}
        self._early: list[tuple[int, PayloadRows]] = []
        self._sums: dict[int, tuple[float, int]] = {}
        self._done: dict[int, float] = {}
        self._hopeless = False

    def join(self, rank: int, manifest: Manifest) -> None:
        """A rank's journal was opened."""
        self._manifests[rank] = manifest
        if len(self._manifests) == self._world_size and self._weights is None:
            self._weights = weights(self._manifests) if aligned(self._manifests) else None
            self._hopeless = self._weights is None
            early, self._early = self._early, []
            for rank_, rows in early:
                self.add(rank_, rows)

    @property
    def hopeless(self) -> bool:
        """Whether no number can ever come: a placement whose norms cannot be combined, a rank that came late."""
        return self._hopeless

    def add(self, rank: int, rows: PayloadRows) -> None:
        """Take in a rank's tensor norms."""
        if self._hopeless or not len(rows):
            return
        if self._weights is None:
            self._early = [*self._early, (rank, rows)][-64:]
            return
        weight = self._weights.get(rank)
        if weight is None or rows.values.shape[1] != len(weight):
            return
        squares = np.where(np.isnan(rows.values), 0.0, rows.values.astype(np.float64) ** 2) @ weight
        for row, square in zip(rows.row.tolist(), squares.tolist()):
            total, count = self._sums.pop(row, (0.0, 0))
            if count + 1 == self._world_size:
                self._done[row] = float(np.sqrt(total + square))
            else:
                self._sums[row] = (total + square, count + 1)
        for waiting in (self._sums, self._done):
            while len(waiting) > _WAITING:
                del waiting[next(iter(waiting))]

    def norm(self, row: int) -> float | None:
        """The global norm of a row; None while it is partial."""
        return self._done.get(row)

    def to_state(self) -> dict[str, Any]:
        return {
            "sums": [[row, *pair] for row, pair in self._sums.items()],
            "done": [[row, norm] for row, norm in self._done.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._sums = {int(row): (float(total), int(count)) for row, total, count in state["sums"]}
        self._done = {int(row): float(norm) for row, norm in state["done"]}
