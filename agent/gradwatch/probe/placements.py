"""How a tensor lies over ranks: whole on every one, or in pieces."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import nn

_MAX_MESH: Final = 4_096
#: Strategies of FSDP1 that leave every rank of the group a piece of its own, and that leave it the whole.
_FLAT: Final = frozenset({"FULL_SHARD", "SHARD_GRAD_OP"})
_WHOLE: Final = frozenset({"NO_SHARD"})


class Placements:
    """Where the parameters of some models lie, as JSON; see :meth:`of`."""

    def __init__(self, model: nn.Module | Sequence[nn.Module]) -> None:
        self._flat: dict[int, dict[str, Any] | None] = {}
        models = [model] if isinstance(model, nn.Module) else model
        for module in (m for root in models for m in root.modules()):
            if any(cls.__name__ == "FullyShardedDataParallel" for cls in type(module).__mro__):
                self._note(module)

    def of(self, parameter: torch.Tensor) -> dict[str, Any] | None:
        """None for a tensor that every rank holds whole.

        Of a ``DTensor``: ``placements``, one a mesh dimension (``{"type": "shard",
        "dim": 0}``, ``replicate``, ``partial``), the mesh's ``shape``, ``names`` and
        ``ranks`` (row by row), this rank's ``coordinate``, and ``local_shape``. Of a
        parameter that FSDP1 cuts, flat or by its own name: its local size alone.
        """
        try:
            tensor_module: Any = sys.modules.get("torch.distributed.tensor")
            if tensor_module is not None and isinstance(parameter, tensor_module.DTensor):
                return _of_dtensor(parameter)
            if id(parameter) in self._flat:
                how = self._flat[id(parameter)]
                return None if how is None else {**how, "local_shape": list(parameter.shape)}
            if hasattr(parameter, "_fsdp_flattened"):  # of an engine that is not among the models
                return {"kind": "unknown", "error": "FSDP1"}
        except Exception as error:  # another version's idea of a placement: better said than lost
            return {"kind": "unknown", "error": type(error).__name__}
        return None

    def _note(self, module: Any) -> None:
        """Take in the parameters that one module of FSDP1 handles: the flat one, and the views into it."""
        try:
            handle = module._handle
            if handle is None:
                return
            strategy = module.sharding_strategy.name
            everywhere = module.process_group.size() == torch.distributed.get_world_size()
            how: dict[str, Any] | None = {"kind": "unknown", "error": f"FSDP1 {strategy}"}
            if strategy in _WHOLE:
                how = None
            elif strategy in _FLAT and everywhere:
                how = {"kind": "flat"}
            for parameter in (handle.flat_param, *(handle.flat_param._params or ())):
                self._flat[id(parameter)] = how
        except Exception:
            return  # `of` says that it does not know


def _of_dtensor(parameter: Any) -> dict[str, Any]:
    mesh = parameter.device_mesh
    ranks = mesh.mesh  # lives on the CPU; which ranks form the mesh
    coordinate = mesh.get_coordinate()
    return {
        "kind": "dtensor",
        "placements": [_of_placement(p) for p in parameter.placements],
        "mesh": {
            "shape": list(ranks.shape),
            "names": list(mesh.mesh_dim_names or ()),
            "ranks": ranks.flatten().tolist() if ranks.numel() <= _MAX_MESH else None,
        },
        "coordinate": None if coordinate is None else list(coordinate),
        "local_shape": list(parameter._local_tensor.shape),
    }


def _of_placement(placed: Any) -> dict[str, Any]:
    kind = type(placed).__name__.lstrip("_")
    if placed.is_replicate():
        return {"type": "replicate"}
    if placed.is_partial():
        return {"type": "partial", "op": str(getattr(placed, "reduce_op", "sum"))}
    told: dict[str, Any] = {"type": {"Shard": "shard", "StridedShard": "strided_shard"}.get(kind, kind.lower())}
    if hasattr(placed, "dim"):
        told["dim"] = int(placed.dim)
    return told
