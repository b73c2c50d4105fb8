"""How far a rank was in the collectives of its process groups when it was watched.

Every rank of a group joins the same collectives in the same order, and the
group counts them. Ranks that began to be watched at the same point of the
training have the same count; one that came later has a higher one, and its rows
must not be put beside those of the others. The count is read and nothing sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def joined(parameters: Iterable[Tensor]) -> int:
    """Collectives that this rank has joined: in the default group, and in those of sharded parameters' meshes."""
    try:
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return 0
        default: Any = torch.distributed.group.WORLD
        groups = {id(default): default}
        for parameter in parameters:
            mesh: Any = getattr(parameter, "device_mesh", None)
            for dimension in range(0 if mesh is None else mesh.ndim):
                group = mesh.get_group(dimension)
                groups[id(group)] = group
        return sum(int(group._get_sequence_number_for_group()) for group in groups.values())
    except Exception:  # another back-end, another version: it does not count
        return 0
