"""Windows: folds of consecutive steps of one optimizer, whose edges are functions of (attempt, step).

A window is L steps long and begins at a multiple of L. L comes from the series
10, 20, 50, 100, 200, 500, … and is the first for which a window takes at least
max(1 s, age / 1000): some 1,000 windows for each further factor e of a run's
age, 2,300 after an hour and 8,900 after a month. L never shrinks within an
attempt, so that a step belongs to one window only, and a fold that is made
again (a restart of the agent, a row read twice) has the same edges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from gradwatch.collect.model import Window
from gradwatch.collect.rows import F64, Rows

SHORTEST: Final = 10
SHORTEST_SECONDS: Final = 1.0
PARTS_OF_AGE: Final = 1_000
#: A window that is short of its time by so little is long enough: clocks jitter.
_NEARLY: Final = 0.99
#: Parameter groups that a window tells the rates of.
MAX_GROUPS: Final = 64


def nice_at_least(steps: float) -> int:
    """The smallest of 10, 20, 50, 100, 200, 500, … that is no less than ``steps``; bounded by 10^9."""
    scale = SHORTEST
    while scale < 10**9:
        for factor in (1, 2, 5):
            if scale * factor >= steps:
                return scale * factor
        scale *= 10
    return scale


@dataclass(slots=True)
class Statistic:
    """Mean, largest and last of the finite values; how many were not finite though known."""

    count: int = 0
    sum: float = 0.0
    max: float | None = None
    last: float | None = None

    def add(self, values: F64) -> None:
        finite = values[np.isfinite(values)]
        if not len(finite):
            return
        largest = float(finite.max())
        self.count += len(finite)
        self.sum += float(finite.sum())
        self.max = largest if self.max is None else max(self.max, largest)
        self.last = float(finite[-1])

    @property
    def mean(self) -> float | None:
        return self.sum / self.count if self.count else None

    def to_state(self) -> list[Any]:
        return [self.count, self.sum, self.max, self.last]


@dataclass(slots=True)
class _Open:
    """The window under way."""

    first_step: int
    end: int
    start_time: float
    end_time: float = 0.0
    last_step: int = 0
    steps: int = 0
    clipped: int = 0
    nonfinite: int = 0
    skipped: int = 0
    replayed: int = 0
    nonfinite_values: int = 0
    samples: float = 0.0
    loss: Statistic = field(default_factory=Statistic)
    norm: Statistic = field(default_factory=Statistic)
    coefficient: Statistic = field(default_factory=Statistic)
    duration: Statistic = field(default_factory=Statistic)
    last: dict[str, float] = field(default_factory=dict)


_STATISTICS: Final = ("loss", "norm", "coefficient", "duration")


class Windows:
    """Folds the final rows of one optimizer into windows."""

    def __init__(self, optimizer: str, attempt: int, run_start: float, groups: tuple[str, ...]) -> None:
        self._optimizer, self._attempt, self._run_start, self._groups = optimizer, attempt, run_start, groups
        self._length = SHORTEST
        self._first_time: float | None = None
        self._taken = 0
        self._open: _Open | None = None
        #: Mean loss of the last window that had one: what ``loss{split="train"}`` shows.
        self.loss: float | None = None

    def add(self, rows: Rows, replayed: np.ndarray[Any, np.dtype[np.bool_]], sampled: dict[str, float]) -> list[Window]:
        """Fold rows in order; return the windows that are complete.

        ``replayed`` marks steps that were trained before; ``sampled`` are
        values of the last sample (``weight_norm_last``, …) as they stand now.
        """
        done: list[Window] = []
        at = 0
        while at < len(rows):
            window = self._open
            step = int(rows.step[at])
            if window is not None and not window.first_step <= step < window.end:
                done.append(self._close())
                window = None
            if window is None:
                window = self._open = self._begin(step, float(rows.time[at]))
            outside = (rows.step[at:] < window.first_step) | (rows.step[at:] >= window.end)
            stop = at + int(np.argmax(outside)) if outside.any() else len(rows)
            self._fold(window, rows.take(slice(at, stop)), replayed[at:stop])
            window.last.update(sampled)
            at = stop
            if window.last_step == window.end - 1 and bool(rows.taken[stop - 1]):
                done.append(self._close())
        return done

    def finish(self) -> list[Window]:
        """The attempt is over: the last, perhaps shorter window."""
        return [self._close()] if self._open is not None else []

    def _begin(self, step: int, time: float) -> _Open:
        if self._first_time is None:
            self._first_time = time
        else:
            seconds = max(time - self._first_time, 0.0) / max(self._taken, 1)
            enough = max(SHORTEST_SECONDS, (time - self._run_start) / PARTS_OF_AGE)
            if seconds > 0 and self._taken >= SHORTEST:
                self._length = max(self._length, nice_at_least(_NEARLY * enough / seconds))
        return _Open(first_step=step, end=(step // self._length + 1) * self._length, start_time=time)

    def _fold(self, window: _Open, rows: Rows, replayed: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        taken = rows.taken
        self._taken += int(taken.sum())
        window.steps += int(taken.sum())
        window.skipped += int((~taken).sum())
        window.clipped += int(rows.clipped.sum())
        window.nonfinite += int(rows.nonfinite.sum())
        window.replayed += int((replayed & taken).sum())
        window.end_time, window.last_step = float(rows.time[-1]), int(rows.step[-1])
        window.nonfinite_values += int((rows.broken & ~np.isfinite(rows.norm)).sum() + rows.bad_loss.sum())
        window.samples += float(np.nansum(np.where(np.isfinite(rows["samples"]), rows["samples"], 0.0)))
        window.loss.add(rows["loss"])
        window.norm.add(rows.norm)
        window.coefficient.add(rows["clip_coefficient"])
        window.duration.add(rows["duration"])
        for name, column in (("clip_threshold_last", "clip_threshold"), ("loss_scale_last", "loss_scale")):
            _keep_last(window.last, name, rows[column])
        for index, group in enumerate(self._groups[:MAX_GROUPS]):
            rate = rows[f"lr_{index}"]
            on_device = rows[f"lr_tensor_{index}"]
            _keep_last(window.last, f"learning_rate_last/{group}", np.where(np.isnan(rate), on_device, rate))
            _keep_last(window.last, f"weight_decay_last/{group}", rows[f"wd_{index}"])

    def _close(self) -> Window:
        window, self._open = self._open, None
        assert window is not None
        if window.loss.mean is not None:
            self.loss = window.loss.mean
        return self._window(window)

    def _window(self, window: _Open) -> Window:
        values = dict(window.last)
        known = {
            "loss_mean": window.loss.mean,
            "loss_max": window.loss.max,
            "loss_last": window.loss.last,
            "grad_norm_mean": window.norm.mean,
            "grad_norm_max": window.norm.max,
            "grad_norm_last": window.norm.last,
            "clip_coefficient_mean": window.coefficient.mean,
            "step_seconds_mean": window.duration.mean,
            "samples": window.samples or None,
            "nonfinite_values": float(window.nonfinite_values) or None,
        }
        values.update({name: value for name, value in known.items() if value is not None})
        return Window(
            optimizer=self._optimizer,
            attempt=self._attempt,
            first_step=window.first_step,
            last_step=window.last_step,
            start_time=window.start_time,
            end_time=window.end_time,
            steps=window.steps,
            clipped=window.clipped,
            nonfinite=window.nonfinite,
            skipped=window.skipped,
            replayed=window.replayed,
            values=values,
        )

    @property
    def mean_loss(self) -> float | None:
        """Mean training loss of the last window, or of the first one while it is under way."""
        if self.loss is None and self._open is not None:
            return self._open.loss.mean
        return self.loss

    def to_state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "length": self._length,
            "first_time": self._first_time,
            "taken": self._taken,
            "loss": self.loss,
        }
        if self._open is not None:
            window = self._open
            state["open"] = {
                name: value.to_state() if isinstance(value := getattr(window, name), Statistic) else value
                for name in _Open.__dataclass_fields__
            }
        return state

    def restore(self, state: dict[str, Any]) -> None:
        self._length, self._first_time = int(state["length"]), state["first_time"]
        self._taken, self.loss = int(state["taken"]), state["loss"]
        if "open" in state:
            fields = dict(state["open"])
            fields |= {name: Statistic(*fields[name]) for name in _STATISTICS}
            self._open = _Open(**fields)


def _keep_last(values: dict[str, float], name: str, column: F64) -> None:
    known = column[np.isfinite(column)]
    if len(known):
        values[name] = float(known[-1])
