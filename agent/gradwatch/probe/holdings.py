"""What one watched optimizer holds: its parameters and groups as they are now, and where they stand in a row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.optim import Optimizer

from gradwatch.journal.manifest import Tensor as Described
from gradwatch.probe import columns as col
from gradwatch.probe.norms import Columns


class Holdings:
    """Parameters and groups of an optimizer, or of several that are stepped as one.

    ``positions`` says in which column of the run's tensors a parameter stands,
    by identity; ``described`` are those tensors; ``groups`` is how many groups
    have columns.
    """

    def __init__(
        self,
        name: str,
        optimizers: Sequence[Optimizer],
        positions: Mapping[int, int],
        described: Sequence[Described],
        groups: int,
    ) -> None:
        self.optimizers = list(optimizers)
        self._name, self._positions, self._described, self._listed = name, positions, described, groups
        self.refresh()

    def refresh(self) -> None:
        """Take in parameters and groups as they are now."""
        self.parameters: list[Tensor] = [p for o in self.optimizers for g in o.param_groups for p in g["params"]]
        self.columns = Columns(self.parameters, [self._positions.get(id(p), -1) for p in self.parameters])
        self.groups: list[dict[str, Any]] = [g for o in self.optimizers for g in o.param_groups]
        self._lists = {id(o): (o.param_groups, len(o.param_groups)) for o in self.optimizers}
        first = len(col.HOST)
        #: Groups that have columns, and where their rate and decay stand in a row.
        self._slots = [
            (group, group["params"], first + i, first + self._listed + i)
            for i, group in enumerate(self.groups[: self._listed])
        ]

    def changed(self, optimizer: Optimizer) -> bool:
        """Whether groups were added, or ``load_state_dict`` put others in their place, since the last refresh."""
        groups, count = self._lists.get(id(optimizer), (None, 0))
        return optimizer.param_groups is not groups or len(groups) != count

    def forget(self) -> None:
        """Let go of all of it: the run is over."""
        self.optimizers.clear()
        self.refresh()

    # -- tensors

    def named(self) -> Iterator[tuple[str, Tensor, int]]:
        """Its parameters with their names and columns; −1 for one that has no column."""
        for index, parameter in enumerate(self.parameters):
            column = int(self.columns.all[index])
            yield self._described[column].name if column >= 0 else f"{self._name}.{index}", parameter, column

    def listed(self) -> tuple[list[Tensor], list[int]]:
        """The parameters that have a column, and their columns."""
        known = [(p, self._positions[id(p)]) for p in self.parameters if id(p) in self._positions]
        return [p for p, _ in known], [column for _, column in known]

    def state(self) -> Mapping[Any, Any]:
        """What the optimizer keeps for each parameter, such as its moments."""
        if len(self.optimizers) == 1:
            return self.optimizers[0].state
        return {parameter: state for optimizer in self.optimizers for parameter, state in optimizer.state.items()}

    # -- settings

    def decay_of_columns(self, count: int) -> npt.NDArray[np.float64]:
        """Weight decay of each of the run's tensors, 0 for those of other optimizers."""
        decays = np.zeros(count)
        for group in self.groups:
            for parameter in group["params"]:
                column = self._positions.get(id(parameter), -1)
                if column >= 0:
                    decays[column] = group.get("weight_decay") or 0.0
        return decays

    def read_groups(self, host: list[float]) -> bool:
        """Put rates and decays into their columns; False where a rate is on a device and travels with its values."""
        plain = True
        for group, params, rate_at, decay_at in self._slots:
            if group["params"] is not params:
                self._lists = {}  # others were put in their place: taken in before the next step
            rate, decay = group.get("lr"), group.get("weight_decay")
            if rate.__class__ is not float:
                if isinstance(rate, Tensor) and rate.device.type != "cpu":
                    rate, plain = math.nan, False
                else:
                    rate = _number(rate)
            host[rate_at] = rate
            host[decay_at] = decay if decay.__class__ is float else _number(decay)
        return plain

    def tensor_rates(self) -> list[Tensor | float]:
        """Learning rates on a device, as copies that the next step of a scheduler does not change."""
        rates = [group["lr"] for group in self.groups[: self._listed]]
        return [r.clone() if isinstance(r, Tensor) and r.device.type != "cpu" else math.nan for r in rates]


def _number(value: object) -> float:
    """A setting of a group as a column holds it; NaN where it has none or none that is a number."""
    try:
        return math.nan if value is None else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def steps_taken(optimizer: Optimizer) -> int:
    """How many steps a restored optimizer has taken, where its state says so on the host, else 0.

    Adam and its kin keep ``step`` in their state; a checkpoint brings it back,
    which is how a resumed run continues its numbering without being told.
    """
    for state in optimizer.state.values():
        step = state.get("step") if isinstance(state, dict) else None
        if isinstance(step, Tensor) and step.device.type == "cpu" and step.numel() == 1:
            return int(step.item())
        if isinstance(step, int | float):
            return int(step)
    return 0
