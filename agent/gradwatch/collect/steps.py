"""The fold of one optimizer's steps: counters that go on over attempts, present values, windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gradwatch.catalog import GRAD_NORM_BUCKETS
from gradwatch.collect.distribution import Distribution
from gradwatch.collect.model import Window
from gradwatch.collect.recent import Recent
from gradwatch.collect.rows import REPLAYED, Mask, Rows
from gradwatch.collect.windows import MAX_GROUPS, Windows
from gradwatch.journal.manifest import Optimizer, clean_text


class Replay:
    """Tells steps that were trained before: a step no higher than the highest one taken so far."""

    def __init__(self, highest: int = -1) -> None:
        self.highest = highest

    def mark(self, rows: Rows) -> Mask:
        steps = np.where(rows.taken, rows.step, -1)
        before = np.maximum.accumulate(np.concatenate([[self.highest], steps]))
        self.highest = int(before[-1])
        marked: Mask = (rows.step <= before[:-1]) | ((rows.flags & REPLAYED) != 0)
        return marked


def group_names(optimizer: Optimizer) -> tuple[str, ...]:
    """What the label ``group`` says: a group's own name where it has one that is its own, else its number."""
    names = [clean_text(group.get("name") or "", 100) for group in optimizer.groups[:MAX_GROUPS]]
    return tuple(name if name and names.count(name) == 1 else str(i) for i, name in enumerate(names)) or ("0",)


class OptimizerFold:
    """Everything that is known of the steps of one optimizer of a run."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.name = optimizer.name
        self.groups = group_names(optimizer)
        # Each step counts once, however often it was trained again after a restart.
        self.steps = self.replayed = self.clipped = self.nonfinite = self.skipped = 0
        self.nonfinite_in_a_row = 0
        self.step = -1
        #: Present values by column; NaN or infinite where the gradient was.
        self.last: dict[str, float] = {}
        self.rates: dict[str, tuple[float, float]] = {}
        self.recent = Recent()
        self.norms = Distribution(GRAD_NORM_BUCKETS)
        self.windows: Windows | None = None
        self._counting = Replay()
        self._finishing = Replay()

    def begin_attempt(self, optimizer: Optimizer, attempt: int, run_start: float) -> None:
        """The same optimizer in a new attempt: counters go on, windows begin anew."""
        self.optimizer, self.groups = optimizer, group_names(optimizer)
        self.windows = Windows(self.name, attempt, run_start, self.groups)

    def count(self, rows: Rows) -> None:
        """Count rows whose norm is known; each row once, in order."""
        if not len(rows):
            return
        replayed = self._counting.mark(rows)
        fresh, taken = ~replayed, rows.taken
        self.steps += int((taken & fresh).sum())
        self.replayed += int((taken & replayed).sum())
        self.clipped += int((rows.clipped & fresh).sum())
        self.nonfinite += int((rows.nonfinite & fresh).sum())
        self.skipped += int((~taken & fresh).sum())
        steps = rows.take(taken)
        if len(steps):
            good = np.flatnonzero(~steps.nonfinite)
            self.nonfinite_in_a_row = (
                len(steps) - 1 - int(good[-1]) if len(good) else self.nonfinite_in_a_row + len(steps)
            )
            self.recent.add(steps)
            self.step = int(steps.step[-1])
            self._keep(steps)
        self.norms.add(rows.norm[taken & fresh])

    def _keep(self, steps: Rows) -> None:
        last = steps.take(slice(-1, None))
        present = {
            "grad_norm": float(last.norm[0]),
            "clip_threshold": float(last["clip_threshold"][0]),
            "clip_coefficient": float(last["clip_coefficient"][0]),
        }
        # NaN stands for "not known", unless the gradient itself is NaN: that one is worth showing.
        if np.isnan(present["grad_norm"]) and not last.broken[0]:
            del present["grad_norm"]
        self.last = {name: value for name, value in present.items() if name == "grad_norm" or not np.isnan(value)}
        for index, group in enumerate(self.groups):
            rate, on_device = float(last[f"lr_{index}"][0]), float(last[f"lr_tensor_{index}"][0])
            decay = float(last[f"wd_{index}"][0])
            self.rates[group] = (on_device if np.isnan(rate) else rate, decay)

    def finish(self, rows: Rows, sampled: Mapping[str, float]) -> list[Window]:
        """Fold final rows into windows; return those that are complete."""
        assert self.windows is not None
        return self.windows.add(rows, self._finishing.mark(rows), dict(sampled))

    def end_attempt(self) -> list[Window]:
        return self.windows.finish() if self.windows is not None else []

    # -- between two lives of the agent

    def to_state(self) -> dict[str, Any]:
        return {
            "counts": [self.steps, self.replayed, self.clipped, self.nonfinite, self.skipped, self.nonfinite_in_a_row],
            "step": self.step,
            "last": self.last,
            "rates": {group: list(pair) for group, pair in self.rates.items()},
            "recent": self.recent.to_state(),
            "norms": self.norms.to_state(),
            "windows": None if self.windows is None else self.windows.to_state(),
            "highest": [self._counting.highest, self._finishing.highest],
        }

    def restore(self, state: dict[str, Any]) -> None:
        counts = (int(value) for value in state["counts"])
        self.steps, self.replayed, self.clipped, self.nonfinite, self.skipped, self.nonfinite_in_a_row = counts
        self.step, self.last = int(state["step"]), dict(state["last"])
        self.rates = {group: (pair[0], pair[1]) for group, pair in state["rates"].items()}
        self.recent = Recent.from_state(state["recent"])
        self.norms.restore(state["norms"])
        if self.windows is not None and state["windows"] is not None:
            self.windows.restore(state["windows"])
        self._counting, self._finishing = (Replay(int(value)) for value in state["highest"])
