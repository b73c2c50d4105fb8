"""Which tensors a run has: names, layers, kinds, where they belong and how they are placed over ranks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from gradwatch.journal.manifest import Tensor
from gradwatch.probe.placements import Placements

#: Modules that only wrap another: torch.compile, FSDP1, activation checkpointing.
_WRAPPERS: Final = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_BIAS: Final = re.compile(r"(^|[._])bias(_|$)|^b_[ih]")
_NORM_PATH: Final = re.compile(r"(^|[._])(\w*norm|ln|bn)_?\w{0,3}($|[._])", re.I)


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A parameter tensor as the journal's manifest describes it, and the parameter itself."""

    tensor: Tensor
    parameter: torch.Tensor


def tensor_table(
    model: nn.Module | Sequence[nn.Module],
    optimizers: Mapping[str, Optimizer | Sequence[Optimizer]],
) -> list[TensorRow]:
    """Every tensor that an optimizer holds, once, in the model's order; what is in no model comes behind.

    A weight shared by several modules has the first of its names. A parameter
    of no model is ``optimizer.<name>.<i>``, *i* counting through the groups.
    Sizes and shapes are global; ``placement`` says what of them is here.
    """
    held: dict[int, tuple[str, int, int, int, torch.Tensor]] = {}
    for index, (name, parts) in enumerate(optimizers.items()):
        groups = [group for part in members(parts) for group in part.param_groups]
        count = 0
        for number, group in enumerate(groups):
            for parameter in group["params"]:
                held.setdefault(id(parameter), (name, index, number, count, parameter))
                count += 1
    placed = Placements(model)
    rows: list[TensorRow] = []
    for name, owner, parameter in named_parameters(model):
        place = held.pop(id(parameter), None)
        if place is not None:
            rows.append(_row(name, owner, parameter, place[1], place[2], placed))
    for label, index, number, count, parameter in held.values():
        rows.append(_row(f"optimizer.{label}.{count}", None, parameter, index, number, placed))
    return rows


def members(optimizers: Optimizer | Sequence[Optimizer]) -> Sequence[Optimizer]:
    """One optimizer, or the several that are stepped as one."""
    return optimizers if isinstance(optimizers, Sequence) else [optimizers]


def named_parameters(
    model: nn.Module | Sequence[nn.Module],
) -> Iterator[tuple[str, nn.Module | None, torch.Tensor]]:
    """Name, owning module and parameter, each parameter once; of several models, behind the model's number."""
    models = [model] if isinstance(model, nn.Module) else list(model)
    seen: set[int] = set()
    for number, root in enumerate(models):
        modules = dict(root.named_modules(remove_duplicate=False))
        for path, parameter in root.named_parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                name = _unwrapped(path, root)
                owner = modules.get(path.rpartition(".")[0])
                yield (name if len(models) == 1 else f"{number}.{name}"), owner, parameter


def layer_of(name: str) -> str:
    """The layer of a parameter, the path of its module: ``encoder.0.weight`` is in ``encoder.0``."""
    path, _, _ = name.partition(".parametrizations.")
    if path == name:
        path = name.rpartition(".")[0]
    return path or "root"


def kind_of(name: str, parameter: torch.Tensor, owner: nn.Module | None) -> str:
    """``norm``, ``embedding``, ``bias`` or ``weight``: by the type of its module, else by name and shape."""
    leaf = name.rpartition(".")[2]
    if owner is not None:
        kind = type(owner).__name__.lower()
        direct = [p for p in owner.parameters(recurse=False) if p is not None]
        if "norm" in kind and all(p.dim() <= 1 for p in direct):
            return "norm"
        if "embedding" in kind and parameter.dim() >= 2:
            return "embedding"
    if _BIAS.search(leaf) and "bias_table" not in leaf:
        return "bias"
    of_torch = owner is not None and type(owner).__module__.partition(".")[0] == "torch"
    named_so = _NORM_PATH.search(name) is not None or leaf in ("gamma", "beta")
    return "norm" if parameter.dim() == 1 and named_so and not of_torch else "weight"


def _row(
    name: str, owner: nn.Module | None, parameter: torch.Tensor, optimizer: int, group: int, placed: Placements
) -> TensorRow:
    return TensorRow(
        Tensor(
            name=name,
            shape=tuple(int(size) for size in parameter.shape),
            dtype=str(parameter.dtype).removeprefix("torch."),
            numel=parameter.numel(),
            optimizer=optimizer,
            group=group,
            layer=layer_of(name),
            kind=kind_of(name, parameter, owner),
            placement=placed.of(parameter),
        ),
        parameter,
    )


def _unwrapped(path: str, root: Any) -> str:
    """A parameter's name without the wrappers around its model, so that it is the same in every set-up."""
    parts = [part for part in path.split(".") if part not in _WRAPPERS]
    while (kind := type(root).__name__) in ("DistributedDataParallel", "DataParallel", "OptimizedModule"):
        if kind != "OptimizedModule" and parts[0] == "module":
            del parts[0]
        root = root._orig_mod if kind == "OptimizedModule" else root.module
    return ".".join(parts)
