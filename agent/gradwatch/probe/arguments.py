"""Arguments of ``watch``: checked at once, refused in plain words."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from gradwatch.catalog import FINDING, FINDINGS

#: More optimizers than this in a plain list are taken for one that is stepped in backward, a part a parameter.
MANY = 16


@dataclass(slots=True)
class Settings:
    """The arguments of one call of ``watch``; see there."""

    models: list[torch.nn.Module]
    optimizers: dict[str, list[Optimizer]]
    model_name: str | None
    max_norm: float | None
    config: Mapping[str, Any]
    scheduler: Any
    run_name: str | None
    tier: str
    clip_rate_budget: float
    generalization_gap_budget: float | Mapping[str, float] | None
    budgets: Mapping[str, float]
    initial_step: int | None
    histograms: bool
    root: Path | None

    @property
    def name(self) -> str:
        """The label ``model``."""
        if self.model_name:
            return self.model_name
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", type(self.models[0]).__name__).lower()

    @property
    def gap_budgets(self) -> dict[str, float]:
        budget = self.generalization_gap_budget
        if budget is None:
            return {}
        if isinstance(budget, Mapping):
            return {str(metric): float(value) for metric, value in budget.items()}
        return {"*": float(budget)}


def models_of(model: object) -> list[torch.nn.Module]:
    """The model, or several, as a list."""
    if isinstance(model, torch.nn.Module):
        return [model]
    if isinstance(model, Sequence) and model and all(isinstance(part, torch.nn.Module) for part in model):
        return list(model)
    hint = "; the order is watch(model, optimizer)" if isinstance(model, Optimizer) else ""
    raise TypeError(f"model: expected a torch.nn.Module, or a sequence of them, got {type(model).__name__}{hint}")


def named_optimizers(optimizer: object) -> dict[str, list[Optimizer]]:
    """Optimizers by name, each as a list of its parts; wrappers (Accelerate's and the like) are taken off."""
    if isinstance(optimizer, Mapping):
        named = {str(name): _parts(value, f"optimizer {name!r}") for name, value in optimizer.items()}
    elif isinstance(optimizer, Sequence):
        parts = _parts(optimizer, "optimizer")
        named = {str(i): [part] for i, part in enumerate(parts)} if len(parts) <= MANY else {"default": parts}
        if len(parts) == 1:
            named = {"default": parts}
    else:
        named = {"default": [_unwrap(optimizer, "optimizer")]}
    if not named:
        raise ValueError("optimizer: none given; pass an optimizer, a list of them, or a dict of names")
    return named


def _parts(value: object, what: str) -> list[Optimizer]:
    if isinstance(value, Sequence):
        return [_unwrap(item, what) for item in value]
    return [_unwrap(value, what)]


def _unwrap(value: object, what: str) -> Optimizer:
    for _ in range(8):
        if (
            hasattr(value, "register_step_pre_hook")
            and isinstance(value, Optimizer)
            and hasattr(value, "_optimizer_step_pre_hooks")
        ):
            inner = getattr(value, "optimizer", None)
            if not isinstance(inner, Optimizer):
                return value
        value = getattr(value, "optimizer", value)
        if isinstance(value, Optimizer) and not isinstance(getattr(value, "optimizer", None), Optimizer):
            return value
    raise TypeError(f"{what}: expected a torch.optim.Optimizer, got {type(value).__name__}")


def number(name: str, value: object, low: float = 0.0, high: float = math.inf) -> float:
    """A number within bounds, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected a number between {low:g} and {high:g}, got {value!r}")
    return float(value)


def check(settings: Settings) -> Settings:
    """Hold every argument against what it must be. Raises ``TypeError`` or ``ValueError``."""
    if settings.model_name is not None and not isinstance(settings.model_name, str):
        raise TypeError(f"model_name: expected text, got {type(settings.model_name).__name__}")
    if settings.max_norm is not None:
        number("max_norm", settings.max_norm)
    if not isinstance(settings.config, Mapping):
        raise TypeError(
            f"config: expected a mapping of names to values, got {type(settings.config).__name__}; "
            "pass vars(args) or dataclasses.asdict(config)"
        )
    if settings.tier not in ("experiment", "production"):
        raise ValueError(f"tier: expected 'experiment' or 'production', got {settings.tier!r}")
    number("clip_rate_budget", settings.clip_rate_budget, 0.0, 1.0)
    budget = settings.generalization_gap_budget
    gaps = {} if budget is None else budget if isinstance(budget, Mapping) else {"": budget}
    for name, value in gaps.items():
        number(f"generalization_gap_budget{f'[{name!r}]' if name else ''}", value)
    _check_budgets(settings.budgets)
    if settings.initial_step is not None and (
        isinstance(settings.initial_step, bool)
        or not isinstance(settings.initial_step, int)
        or settings.initial_step < 0
    ):
        raise ValueError(f"initial_step: expected a whole number from 0, got {settings.initial_step!r}")
    return settings


def _check_budgets(budgets: object) -> None:
    """Each budget is a number under the code of a health finding that has no argument of its own."""
    if not isinstance(budgets, Mapping):
        raise TypeError(f"budgets: expected a mapping of finding codes to numbers, got {type(budgets).__name__}")
    own = {"clip-rate-high": "clip_rate_budget", "generalization-gap": "generalization_gap_budget"}
    for code, value in budgets.items():
        if code in own:
            raise ValueError(f"budgets: {code!r} has an argument of its own, {own[code]}")
        if code not in FINDING or FINDING[code].kind != "health":
            near = difflib.get_close_matches(str(code), [f.code for f in FINDINGS if f.kind == "health"], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"budgets: no health finding has the code {code!r}{hint}")
        number(f"budgets[{code!r}]", value)
