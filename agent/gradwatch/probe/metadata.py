"""What a run is made of: the hyperparameters that reproduction needs, collected without being asked.

`collect` reads optimizers, model, scheduler, precision, code and machine once,
before the first step; `flatten` makes flat parameters of it, as MLflow and
``hyperparameter`` want them. No device is synchronised: a learning rate that is
a tensor on a device is called ``"tensor"``. A part that cannot be read is left
out; nothing here raises.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gradwatch.probe import provenance
from gradwatch.probe.redact import clean, jsonable
from gradwatch.probe.tensors import TensorRow, layer_of, members, named_parameters, tensor_table

__all__ = ["TensorRow", "collect", "decay_of", "flatten", "is_linear", "layer_of", "tensor_table"]

#: How optimizers apply weight decay: decoupled from the gradient (Loshchilov & Hutter, 2019), or coupled to
#: it as an L2 penalty. Known by class name, since forks and fused variants keep the name and the meaning.
_DECAY: Final = {
    "AdamW": "decoupled",
    "Adafactor": "decoupled",
    "Muon": "decoupled",
    "Lion": "decoupled",
    "SGD": "coupled",
    "Adam": "coupled",
    "NAdam": "coupled",
    "RAdam": "coupled",
    "Adagrad": "coupled",
    "Adadelta": "coupled",
    "Adamax": "coupled",
    "ASGD": "coupled",
    "RMSprop": "coupled",
    "Rprop": "none",
    "LBFGS": "none",
    "SparseAdam": "none",
}
_UNOPTIMIZED_NAMED: Final = 20
#: Groups of an optimizer that become flat parameters; all of them are in the manifest.
_GROUPS_FLAT: Final = 32
_SCHEDULERS: Final = 16
_SCHEDULER_STATE: Final = frozenset({"optimizer", "last_epoch", "base_lrs", "verbose"})

Flat = str | float | int | bool


def collect(
    model: nn.Module | Sequence[nn.Module],
    optimizers: Mapping[str, Optimizer | Sequence[Optimizer]],
    *,
    scheduler: Any = None,
    config: Mapping[str, Any] | None = None,
    max_norm: float | None = None,
) -> dict[str, Any]:
    """Everything that is known about a run before its first step, as plain JSON without secrets.

    Args:
        model: the model, or several.
        optimizers: by name; a value may be several that are stepped as one.
        scheduler: the learning rate scheduler(s); looked for where None.
        config: the user's own hyperparameters; nested.
        max_norm: the declared clip threshold.

    Returns:
        ``optimizers``: a list of ``name``, ``class``, ``decay`` (``coupled``, ``decoupled``, ``none``,
        ``unknown``), ``linear``, ``settings`` (betas, momentum, eps, …) and ``groups``, each with ``lr``,
        ``weight_decay``, its ``tensors`` and ``parameters``, and whether it holds ``biases`` or ``norms``;
        ``scheduler``, ``model``, ``precision``, ``device``, ``machine``, ``git``, ``seed``, ``world_size``,
        ``host``, ``script``, ``max_norm``, ``config``.
    """
    every = _attempt(lambda: list(named_parameters(model)), [])
    table = _attempt(lambda: tensor_table(model, optimizers), [])
    tensors = [parameter for _, _, parameter in every]
    facts = {
        "optimizers": [
            _attempt(partial(_optimizer, index, name, members(parts), table), _unknown_optimizer(name))
            for index, (name, parts) in enumerate(optimizers.items())
        ],
        "scheduler": _attempt(lambda: _scheduler(scheduler, optimizers), None),
        "model": _attempt(lambda: _model(model, every, table), {}),
        "precision": _attempt(lambda: _precision(tensors), {}),
        "device": _attempt(lambda: provenance.device(tensors), {}),
        "machine": _attempt(provenance.machine, {}),
        "git": _attempt(provenance.git, {}),
        "seed": _attempt(provenance.seed, None),
        "world_size": _attempt(_world_size, 1),
        "host": _attempt(socket.gethostname, None),
        "script": _attempt(lambda: os.path.basename(sys.argv[0]), None),  # noqa: PTH119
        "max_norm": jsonable(max_norm),
    }
    return {**facts, "config": clean(config if config is not None else {})}


def _attempt(read: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return read()
    except Exception:
        return otherwise


# -- optimizers


def _optimizer(index: int, name: str, parts: Sequence[Optimizer], table: Sequence[TensorRow]) -> dict[str, Any]:
    groups = [group for part in parts for group in part.param_groups]
    rows: list[list[TensorRow]] = [[] for _ in groups]
    for row in table:
        if row.tensor.optimizer == index:
            rows[row.tensor.group].append(row)
    defaults = {key: _setting(value) for key, value in parts[0].defaults.items() if value is not None}
    return {
        "name": name,
        "class": type(parts[0]).__name__,
        "decay": decay_of(parts[0]),
        "linear": is_linear(parts[0]),
        "settings": {key: value for key, value in defaults.items() if key not in ("lr", "weight_decay")},
        "groups": [_group(group, of_group, defaults) for group, of_group in zip(groups, rows, strict=True)],
    }


def _unknown_optimizer(name: str) -> dict[str, Any]:
    unknown = {"class": "unknown", "decay": "unknown", "linear": False, "settings": {}, "groups": []}
    return {"name": name, **unknown}


def _group(group: Mapping[str, Any], rows: Sequence[TensorRow], defaults: Mapping[str, Any]) -> dict[str, Any]:
    kinds = Counter(row.tensor.kind for row in rows)
    own = {key: _setting(value) for key, value in group.items() if key != "params" and value is not None}
    return {
        "name": str(group.get("name", "")),
        "lr": own.get("lr"),
        "weight_decay": own.get("weight_decay", 0.0),
        "tensors": len(group["params"]),
        "parameters": sum(parameter.numel() for parameter in group["params"]),
        "biases": kinds["bias"] > 0,
        "norms": kinds["norm"] > 0,
        "kinds": dict(kinds),
        **{k: v for k, v in own.items() if k not in ("lr", "weight_decay", "name") and defaults.get(k) != v},
    }


def _setting(value: Any) -> Any:
    """A setting as JSON; a tensor gives its value only where reading it waits for nothing."""
    if isinstance(value, torch.Tensor):
        plain = type(value) in (torch.Tensor, nn.Parameter) and value.device.type == "cpu" and value.numel() == 1
        return jsonable(float(value.detach())) if plain else "tensor"
    if isinstance(value, tuple | list):
        return [_setting(item) for item in value]
    return jsonable(value)


def decay_of(optimizer: Optimizer) -> str:
    """How ``optimizer`` applies weight decay: ``coupled``, ``decoupled``, ``none`` (it has none), ``unknown``.

    Adam, NAdam and RAdam say it themselves (``decoupled_weight_decay``), Apex's and DeepSpeed's Adam by
    ``adam_w_mode``. Else the class decides, or the class whose ``step`` it inherits.
    """
    flags = {bool(g["decoupled_weight_decay"]) for g in optimizer.param_groups if "decoupled_weight_decay" in g}
    if len(flags) == 1 and _known_class(optimizer) is not None:
        return "decoupled" if flags.pop() else "coupled"
    mode = getattr(optimizer, "adam_w_mode", None)
    if isinstance(mode, bool | int):
        return "decoupled" if mode else "coupled"
    known = _known_class(optimizer)
    return _DECAY[known.__name__] if known is not None else "unknown"


def is_linear(optimizer: Optimizer) -> bool:
    """Whether the step is linear in the gradient, so that a clip coefficient scales the learning rate."""
    known = _known_class(optimizer)
    return known is not None and known.__name__ == "SGD"


def _known_class(optimizer: Optimizer) -> type | None:
    """The class of `_DECAY` whose ``step`` this optimizer runs."""
    mine = _step_of(type(optimizer))
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _DECAY:
            return cls if _step_of(cls) is mine else None
    return None


def _step_of(cls: type) -> Any:
    # torch wraps the `step` of every class that is instantiated, to call hooks and name it in profiles.
    return inspect.unwrap(cls.step)  # type: ignore[attr-defined]


# -- scheduler


def _scheduler(given: Any, optimizers: Mapping[str, Optimizer | Sequence[Optimizer]]) -> Any:
    if given is None:
        given = _schedulers_of([part for parts in optimizers.values() for part in members(parts)])
    items = list(given) if isinstance(given, Sequence) else [given]
    return describe_schedulers(items)


def describe_schedulers(schedulers: Sequence[Any]) -> Any:
    """Class and settings of a scheduler, of several a list; None of none. A part of another is told within it."""
    inner = {id(part) for outer in schedulers for part in getattr(outer, "_schedulers", ())}
    outermost = [scheduler for scheduler in schedulers if id(scheduler) not in inner]
    described = [_describe_scheduler(item, 0) for item in outermost[:_SCHEDULERS]]
    return (described[0] if len(described) == 1 else described) or None


def _schedulers_of(optimizers: Sequence[Optimizer]) -> list[LRScheduler]:
    """The outermost schedulers of these optimizers, which know nothing of them, while the collector does.

    Two passes over the heap whatever their number: who holds an optimizer, and
    whose ``__dict__`` is it.
    """
    mine = {id(optimizer) for optimizer in optimizers}
    holders = gc.get_referrers(*optimizers)
    dicts = [h for h in holders if type(h) is dict and id(h.get("optimizer")) in mine]
    owners = gc.get_referrers(*dicts) if dicts else []
    found = {
        id(candidate): candidate
        for candidate in [*holders, *owners]
        if issubclass(type(candidate), LRScheduler) and id(candidate.optimizer) in mine
    }
    inner = {id(part) for outer in found.values() for part in getattr(outer, "_schedulers", ())}
    return [scheduler for key, scheduler in found.items() if key not in inner]


def _describe_scheduler(scheduler: Any, depth: int) -> dict[str, Any]:
    inner = getattr(scheduler, "scheduler", None)
    if inner is not None and not isinstance(scheduler, LRScheduler) and depth < 4:  # Accelerate's wrapper
        return _describe_scheduler(inner, depth + 1)
    settings = {
        key: value
        for key, value in vars(scheduler).items()
        if not key.startswith("_") and key not in _SCHEDULER_STATE and "optimizer" not in key
    }
    described = {"class": type(scheduler).__name__, **{k: _setting(v) for k, v in settings.items()}}
    parts = getattr(scheduler, "_schedulers", None)
    if parts and depth < 4:
        described["schedulers"] = [_describe_scheduler(part, depth + 1) for part in parts]
        if hasattr(scheduler, "_milestones"):
            described["milestones"] = jsonable(scheduler._milestones)
    return described


# -- model and precision


def _model(
    model: nn.Module | Sequence[nn.Module],
    every: Sequence[tuple[str, nn.Module | None, torch.Tensor]],
    table: Sequence[TensorRow],
) -> dict[str, Any]:
    models = [model] if isinstance(model, nn.Module) else list(model)
    held = {id(row.parameter) for row in table}
    trainable = [(name, p) for name, _, p in every if p.requires_grad]
    left = [(name, p) for name, p in trainable if id(p) not in held]
    total = sum(p.numel() for _, _, p in every)
    train = sum(p.numel() for _, p in trainable)
    return {
        "class": ", ".join(type(m).__name__ for m in models),
        "tensors": len(every),
        "parameters": {"total": total, "trainable": train, "frozen": total - train},
        "unoptimized": {
            "tensors": len(left),
            "parameters": sum(p.numel() for _, p in left),
            "names": [name for name, _ in left[:_UNOPTIMIZED_NAMED]],
        },
    }


def _precision(parameters: Sequence[torch.Tensor]) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for parameter in parameters:
        counts[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    kinds = {p.device.type for p in parameters} | {"cpu"}
    autocast = {
        kind: str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
        for kind in sorted(kinds - {"meta"})
        if torch.is_autocast_enabled(kind)
    }
    label = "+".join(name for name, _ in counts.most_common()) or "none"
    if autocast:
        label += f" autocast {'+'.join(sorted(set(autocast.values())))}"
    return {
        "training": label,
        "parameters": dict(counts),
        "autocast": autocast,
        "matmul": _attempt(torch.get_float32_matmul_precision, None),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _world_size() -> int:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdigit() else 1


# -- flat parameters


def flatten(facts: Mapping[str, Any]) -> dict[str, Flat]:
    """``collect``'s facts as flat names and scalars.

    Like ``optimizer.default.betas``, ``group.default.0.weight_decay``,
    ``config.batch_size``, ``scheduler.class``, ``git.commit``. Lists of scalars
    are JSON text; what is None or empty is left out.
    """
    flat: dict[str, Flat] = {}
    for key, value in facts.items():
        if key != "optimizers":
            _flatten(flat, key, value)
    for optimizer in facts.get("optimizers", ()):
        head = {k: v for k, v in optimizer.items() if k not in ("name", "groups", "settings")}
        _flatten(flat, f"optimizer.{optimizer['name']}", {**head, **optimizer.get("settings", {})})
        for number, group in enumerate(optimizer.get("groups", ())[:_GROUPS_FLAT]):
            own = {k: v for k, v in group.items() if k != "kinds" and not (k == "name" and not v)}
            _flatten(flat, f"group.{optimizer['name']}.{number}", own)
    return flat


def _flatten(flat: dict[str, Flat], name: str, value: Any) -> None:
    if value is None or (isinstance(value, Mapping | list) and not value):
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            _flatten(flat, f"{name}.{key}", item)
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        for number, item in enumerate(value):
            _flatten(flat, f"{name}.{number}", item)
    elif isinstance(value, list):
        flat[name] = json.dumps(value)
    else:
        flat[name] = value
