"""Norms of gradients, tensor by tensor: from what a clip computed, or measured here.

All norms are pre-clip, of this rank's local data, and stay where the gradients
are: nothing here looks at a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

#: Stands for a column: of a tensor of another optimizer, or of one of this optimizer that has none.
FOREIGN: Final = -2
UNLISTED: Final = -1
#: Dtypes whose own norm is coarse or overflows: they are measured in float32.
LOW_PRECISION: Final = frozenset({torch.float16, torch.bfloat16})


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, dense: a DTensor's shard, the values of a sparse tensor."""
    shard = getattr(tensor, "_local_tensor", None)
    if shard is not None:
        tensor = shard
    if tensor.layout is not torch.strided:
        tensor = tensor.coalesce().values() if tensor.layout is torch.sparse_coo else tensor.values()
    return tensor.detach()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor: told by its attribute, so that ``torch.distributed`` is not imported for it."""
    # Looking an attribute up that is not there costs more than everything else of a clip's bookkeeping.
    return tensor.__class__ is not Tensor and hasattr(tensor, "_local_tensor")


def l2_norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The L2 norm of each local tensor, as 0-d device tensors in float32 or wider.

    ``‖t‖₂ = sqrt(Σ tᵢ²)``. Costs one fused kernel for each device and dtype;
    an empty tensor has norm 0.
    """
    plain = [local(t) for t in tensors]
    if not plain:
        return []
    dtypes = {t.dtype for t in plain}
    if len(dtypes) == 1 and not dtypes & LOW_PRECISION:
        return list(torch._foreach_norm(plain, 2.0))
    if dtypes <= {torch.float32, *LOW_PRECISION}:
        return list(torch._foreach_norm(plain, 2.0, torch.float32))
    norms: list[Tensor] = []
    for t in plain:
        wide = torch.float32 if t.dtype in LOW_PRECISION else None
        norms.append(torch.linalg.vector_norm(t, 2.0, dtype=wide))
    return norms


def stack(norms: list[Tensor]) -> Tensor:
    """0-d tensors as one vector on the first one's device, as float32 or, from float64, float64."""
    first = norms[0]
    if all(n.dtype == first.dtype and n.device == first.device for n in norms):
        return torch.stack(norms)
    return torch.stack([n.to(device=first.device, dtype=torch.float32, non_blocking=True) for n in norms])


class Columns:
    """Which columns of ``tensors.ring`` a list of parameters stands in, remembered by identity.

    Callers pass the same parameters in a new list at every step; comparing
    identities costs 30 ns a tensor, never calls ``Tensor.__eq__``, and saves
    the look-up.
    """

    def __init__(self, parameters: Sequence[Tensor], columns: Sequence[int]) -> None:
        self._column: dict[int, int] = {id(p): c for p, c in zip(parameters, columns)}
        self._keep = list(parameters)  # ids stay valid while the tensors live
        self._known: list[tuple[list[Any], npt.NDArray[np.intp], bool]] = []
        self.all = np.array(columns, dtype=np.intp)

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._column

    def of(self, parameters: list[Tensor]) -> tuple[npt.NDArray[np.intp], bool]:
        """Columns of those parameters (or what stands for one), and whether every parameter known is among them."""
        for known, columns, whole in self._known:
            if len(known) == len(parameters) and all(map(is_, known, parameters)):
                return columns, whole
        found = [self._column.get(id(p), FOREIGN) for p in parameters]
        columns = np.array(found, dtype=np.intp)
        whole = len({id(p) for p in parameters} & self._column.keys()) == len(self._column)
        self._known = [(list(parameters), columns, whole), *self._known[:7]]
        return columns, whole
