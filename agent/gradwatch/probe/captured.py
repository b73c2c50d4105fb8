"""The arithmetic of a clip: torch's own code with its per-tensor norms kept, and a shorter way where all is alike.

Torch groups gradients by device and dtype before it computes; the order of the
groups decides the last bits of the total. So its own code runs, with a stand-in
for the ``torch`` that it refers to, which notes the norms as they pass. Where
all gradients are plain tensors of one device and one dtype there is one group,
and the same kernels are called without the grouping.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import is_
from types import CodeType, FunctionType
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

_foreach_norm = torch._foreach_norm
_foreach_mul_ = torch._foreach_mul_
_stack = torch.stack
_vector_norm = torch.linalg.vector_norm
_float32 = np.float32
#: How many modes look at each operator; always some where torch no longer tells.
_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_ONE, _EPSILON = np.float32(1.0), np.float32(1e-6)
#: Bound of a norm and a threshold whose quotient is far from overflow.
_LARGE: Final = 1e30

#: The names that torch's functions refer to (2.6 to 2.13). The short way stands in for these and no others: a
#: torch that computes in another way is given its own code to run.
_KNOWN: Final = {
    name: frozenset(names.split())
    for name, names in {
        "clip_grad_norm_": (
            "GeneratorType Tensor _clip_grads_with_norm_ _get_total_norm grad isinstance len list torch types"
            " warn warnings"
        ),
        "_get_total_norm": (
            "0.0 RuntimeError Tensor _device_has_foreach_support _foreach_norm"
            " _group_tensors_by_device_and_dtype _has_foreach_support device extend float isinf isinstance isnan"
            " items len linalg list logical_or stack tensor to torch type vector_norm"
        ),
        "_clip_grads_with_norm_": (
            "1.0 1e-06 RuntimeError Tensor _device_has_foreach_support _foreach_mul_"
            " _group_tensors_by_device_and_dtype _has_foreach_support clamp float grad isinstance items len mul_"
            " to torch type"
        ),
    }.items()
}


def alike(grads: list[Tensor], total: Any = None) -> bool:
    """Whether torch would put ``grads`` into one group and use its foreach kernels, ``total`` being beside them."""
    if not grads:
        return False
    first = grads[0]
    dtype = first.dtype
    if total is not None and (total.__class__ is not Tensor or total.device != first.device):
        return False
    if first.is_cpu:
        for g in grads:  # noqa: SIM110 - a generator costs twice as much
            if g.__class__ is not Tensor or g.dtype is not dtype or not g.is_cpu:
                return False
        return True
    if not first.is_cuda:
        return False
    device = first.device
    return all(g.__class__ is Tensor and g.dtype is dtype and g.device == device for g in grads)


def norm_alike(grads: list[Tensor], norm_type: float) -> tuple[Tensor, Tensor]:
    """Per-tensor norms as a vector, and the total, of gradients that are :func:`alike`."""
    norms = _stack(_foreach_norm(grads, norm_type))
    return norms, _vector_norm(norms, norm_type)


def clip_alike_(grads: list[Tensor], max_norm: float, total: Tensor) -> None:
    """Scale gradients that are :func:`alike` by ``min(1, max_norm / (total + 1e-6))``, in place.

    ``number / tensor`` is ``tensor.reciprocal() * number`` in torch, and is done so here in the tensor's dtype.
    In float32 on the host numpy does the same four operations, each rounded the same, in a fifth of the time;
    what is not finite, and with it numpy's warnings, goes torch's way, and so does what a dispatch mode looks at.
    """
    if total.dtype is torch.float32 and total.is_cpu and max_norm <= _LARGE and not _dispatch_modes():
        value = total.item()
        if 0.0 <= value <= _LARGE:
            factor = _ONE / (_float32(value) + _EPSILON) * _float32(max_norm)
            _coefficient.number[()] = factor if factor < _ONE else _ONE
            _foreach_mul_(grads, _coefficient.tensor)
            return
    _foreach_mul_(grads, total.add(1e-6).reciprocal_().mul_(max_norm).clamp_(max=1.0))


class _Coefficient(threading.local):
    """The clip coefficient of this thread's clip under way: memory of one number, seen by numpy and by torch."""

    def __init__(self) -> None:
        self.number = np.ones((), np.float32)
        with torch.inference_mode(False):
            self.tensor = torch.from_numpy(self.number)


_coefficient = _Coefficient()


class _Linalg:
    def __init__(self, inputs: list[Tensor]) -> None:
        self._inputs = inputs

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.linalg, name)

    def vector_norm(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._inputs.append(tensor)
        norm: Tensor = _vector_norm(tensor, *args, **kwargs)
        return norm


class _Torch:
    """What torch's code takes for ``torch``: notes whose norms were taken, in which order, and what was stacked."""

    def __init__(self) -> None:
        self.inputs: list[Tensor] = []
        self.pieces: list[Tensor] = []
        self.stacked: Tensor | None = None
        self.linalg = _Linalg(self.inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def _foreach_norm(self, tensors: list[Tensor], *args: Any, **kwargs: Any) -> Any:
        self.inputs.extend(tensors)
        return _foreach_norm(tensors, *args, **kwargs)

    def stack(self, tensors: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.pieces = tensors
        self.stacked = _stack(tensors, *args, **kwargs)
        return self.stacked

    def norms_of(self, tensors: list[Tensor]) -> Tensor | None:
        """The norms in the order of ``tensors``; a DTensor's is that of its local shard, so that no rank waits.

        The last tensor that was noted is the vector of norms itself, of which the total was taken.
        """
        inputs, pieces, stacked = self.inputs[:-1], self.pieces, self.stacked
        if stacked is None or not len(inputs) == len(pieces) == len(tensors):
            return None
        plain = stacked.__class__ is Tensor
        if plain and all(map(is_, inputs, tensors)):
            return stacked
        place = {id(t): i for i, t in enumerate(inputs)}
        order = [place[id(t)] for t in tensors]
        if plain and stacked.is_cpu:
            return stacked.index_select(0, torch.tensor(order))
        # Stacked anew: an index would have to be copied to the device, which waits for it.
        return _stack([pieces[i] if plain else getattr(pieces[i], "_local_tensor", pieces[i]) for i in order])


def captured_norm(
    original: Callable[..., Tensor], tensors: list[Tensor], *args: Any, **kwargs: Any
) -> tuple[Tensor | None, Tensor]:
    """Run ``original(tensors, …)``, torch's own ``_get_total_norm``, and keep the per-tensor norms.

    Each call runs on a function of its own, with the same code and a copy of
    its globals: nothing that is shared changes, whatever other threads do.
    """
    function = original
    if not isinstance(function, FunctionType) or "torch" not in function.__code__.co_names:
        return None, original(tensors, *args, **kwargs)
    seen = _Torch()
    run = FunctionType(
        function.__code__,
        {**function.__globals__, "torch": seen},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    run.__kwdefaults__ = function.__kwdefaults__
    total = run(tensors, *args, **kwargs)
    try:
        return seen.norms_of(tensors), total
    except Exception:
        return None, total


def is_known(function: Any) -> bool:
    """Whether ``function`` is the code of torch that the short way was written against."""
    if not isinstance(function, FunctionType):
        return False
    return _names(function.__code__) == _KNOWN.get(function.__name__)


def _names(code: CodeType) -> frozenset[str]:
    """All names and numbers that a function and its comprehensions refer to."""
    inner = [_names(c) for c in code.co_consts if isinstance(c, CodeType)]
    numbers = (repr(c) for c in code.co_consts if isinstance(c, float))
    return frozenset(code.co_names).union(numbers, *inner)
