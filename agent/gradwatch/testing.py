"""For tests of what reads journals: a journal without a training, a clock without time, a sink in memory.

    with JournalBuilder(root, run="r1") as journal:
        journal.step(loss=0.7, grad_norm=2.0, clip_threshold=1.0)
        journal.validation(loss=0.9)

A builder writes real journals through the writer that training processes use,
and needs neither torch nor a model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import numpy as np

from gradwatch.collect.model import Finding, LayerTable, RunEnd, RunFacts, Validation, Window
from gradwatch.journal import JournalWriter, attempt_directory
from gradwatch.journal.manifest import Manifest, Optimizer, Section, Tensor

__all__ = ["FakeClock", "JournalBuilder", "MemorySink"]

_HOST = (
    "optimizer",
    "backwards",
    "duration",
    "samples",
    "probe_seconds",
    "flags",
    "clip_threshold",
    "value_threshold",
)
_DEVICE = ("loss", "grad_norm", "grad_norm_l2", "clip_coefficient", "nonfinite", "loss_scale")
_EPSILON = 1e-6


class FakeClock:
    """A clock that stands still until it is told to move; call it for the time."""

    def __init__(self, now: float = 1_700_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class JournalBuilder:
    """Writes the journal of one attempt of one rank.

    Args:
        root: the directory of journals.
        run, model, attempt, rank, world_size: identity.
        optimizers: names, each with one parameter group; or :class:`Optimizer` objects.
        tensors: names (each its own layer, of optimizer 0), or :class:`Tensor` objects.
        budgets, hyperparameters, and whatever else a manifest has: as there.
        clock: where rows get their time; each step moves it by ``seconds_a_step``.
        capacity: bytes of the attempt.
    """

    #: Directories that are being written: a record lock is not seen by the process that holds it, so a test
    #: that reads in the writer's process asks here.
    open_directories: ClassVar[set[Path]] = set()

    def __init__(
        self,
        root: Path,
        *,
        run: str = "run-1",
        model: str = "model",
        attempt: int = 0,
        rank: int = 0,
        world_size: int = 1,
        optimizers: Sequence[str | Optimizer] = ("default",),
        tensors: Sequence[str | Tensor] = ("layer1.weight", "layer2.weight"),
        clock: FakeClock | None = None,
        seconds_a_step: float = 0.01,
        capacity: int = 4 * 2**20,
        first_step: int = 0,
        **manifest: Any,
    ) -> None:
        self.clock = clock or FakeClock()
        self.seconds_a_step = seconds_a_step
        group = {"name": "", "lr": 0.1, "weight_decay": 0.0}
        named = tuple(Optimizer(o, "SGD", True, (group,)) if isinstance(o, str) else o for o in optimizers)
        table = tuple(
            Tensor(t, (10,), "float32", 10, 0, 0, t.rpartition(".")[0] or t) if isinstance(t, str) else t
            for t in tensors
        )
        self._groups = max((len(o.groups) for o in named), default=1)
        rates = tuple(f"{kind}_{i}" for kind in ("lr", "wd") for i in range(self._groups))
        count = len(table)
        self.manifest = Manifest(
            **{
                "run": run,
                "model": model,
                "run_name": run,
                "attempt": attempt,
                "rank": rank,
                "world_size": world_size,
                "start_time": self.clock(),
                "optimizers": named,
                "tensors": table,
                "host_columns": _HOST + rates,
                "device_columns": _DEVICE,
                "sections": (
                    Section("global", 0, 8),
                    Section("weight_norm", 8, count),
                    Section("update_norm", 8 + count, count),
                ),
                "budgets": {"clip_rate": 0.1, "generalization_gap": {"*": 0.1}},
                **manifest,
            }
        )
        self.directory = attempt_directory(root, run, rank, attempt)
        self.writer = JournalWriter(self.directory, self.manifest, capacity)
        JournalBuilder.open_directories.add(self.directory)
        self._next = [first_step] * len(named)
        self._last = -1
        self._device: list[float] = []

    def step(
        self,
        *,
        optimizer: int = 0,
        step: int | None = None,
        loss: float = math.nan,
        grad_norm: float = 1.0,
        grad_norm_l2: float | None = None,
        clip_threshold: float = math.nan,
        nonfinite: int | None = None,
        skipped: bool = False,
        flags: int = 0,
        lr: float | Sequence[float] = 0.1,
        weight_decay: float | Sequence[float] = 0.0,
        samples: float = math.nan,
        duration: float | None = None,
        probe_seconds: float = 1e-6,
        loss_scale: float = math.nan,
        tensors: Sequence[float] | None = None,
        landed: bool = True,
    ) -> int:
        """Write one row; return its sequence number. ``landed=False`` leaves the device values for :meth:`land`.

        By default the tensors share the norm evenly, and a norm that is not
        finite comes from the first tensor.
        """
        took = self.seconds_a_step if duration is None else duration
        self.clock.advance(took)
        number = self._next[optimizer] if step is None else step
        self._next[optimizer] = number if skipped else number + 1
        clips = not math.isnan(clip_threshold)
        rates = _spread(lr, self._groups) + _spread(weight_decay, self._groups)
        bits = flags | (1 if skipped else 0) | (4 if clips else 0)
        host = [optimizer, 1, took, samples, probe_seconds, bits, clip_threshold, math.nan, *rates]
        broken = not math.isfinite(grad_norm) and not math.isnan(grad_norm_l2 or 0.0)
        wide = grad_norm if grad_norm_l2 is None else grad_norm_l2
        coefficient = min(1.0, clip_threshold / (grad_norm + _EPSILON)) if clips else math.nan
        self._device = [
            loss,
            grad_norm,
            wide,
            coefficient,
            float(int(broken)) if nonfinite is None else float(nonfinite),
            loss_scale,
        ]
        sequence = self.writer.steps.append(number, self.clock(), host, self._device if landed else None)
        count = len(self.manifest.tensors)
        payload = self.writer.tensors.payload
        if tensors is not None:
            payload[:] = tensors
        elif count:
            owners = np.array([t.optimizer for t in self.manifest.tensors])
            own = owners == optimizer
            payload[:] = np.where(own, float(wide) / math.sqrt(max(1, int(own.sum()))), np.nan)
            if broken:
                payload[:] = np.where(own, 0.0, np.nan)
                payload[int(np.flatnonzero(own)[0]) if own.any() else 0] = np.inf
        self.writer.tensors.append(sequence, number, self.clock())
        self._last = number
        return sequence

    def late_loss(self, loss: float, sequence: int | None = None) -> None:
        """Log a loss behind its step: the row's second part is written again."""
        self._device[0] = loss
        self.writer.steps.complete(sequence or self.writer.steps.sequence, self._device)

    def land(self, sequence: int, **device: float) -> None:
        """The device values of a row arrive: by column name, the others as the last step had them."""
        values = [device.get(name, value) for name, value in zip(_DEVICE, self._device)]
        self.writer.steps.complete(sequence, values)

    def sample(self, weight_norm: Sequence[float], update_norm: Sequence[float], *, optimizer: int = 0) -> None:
        """Write a sample of weights behind the last step; the global values follow from the tensors'."""
        count = len(self.manifest.tensors)
        payload = self.writer.samples.payload
        payload[:] = np.nan
        weight, update = np.linalg.norm(weight_norm), np.linalg.norm(update_norm)
        payload[:4] = np.array([float(optimizer), weight, update, update / weight])
        payload[8 : 8 + count] = weight_norm
        payload[8 + count : 8 + 2 * count] = update_norm
        self.writer.samples.append(self.writer.steps.sequence, self._last, self.clock())

    def validation(
        self,
        *,
        slice: str = "",
        train: Mapping[str, float] | None = None,
        higher_is_better: Mapping[str, bool] | None = None,
        **metrics: float,
    ) -> None:
        """Write a validation event."""
        self.event(
            "validation",
            metrics=metrics,
            slice=slice,
            train=dict(train or {}),
            higher_is_better=dict(higher_is_better or {}),
        )

    def event(self, kind: str, **fields: Any) -> None:
        """Write any event; ``time``, ``row`` and ``step`` are those of now unless given."""
        now = {"kind": kind, "time": self.clock(), "row": self.writer.steps.sequence, "step": self._last}
        self.writer.events.write(now | fields)

    def end(self, state: str = "finished", **fields: Any) -> None:
        """Write the end and let go, as a process that finishes does."""
        self.event("end", state=state, reason=fields.pop("reason", state), **fields)
        self.vanish()

    def vanish(self) -> None:
        """Let go without a word, as a process that was killed does."""
        JournalBuilder.open_directories.discard(self.directory)
        self.writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        else:
            self.vanish()


@dataclass
class MemorySink:
    """A sink that keeps what it is given."""

    name: str = "memory"
    started: list[RunFacts] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    validations: list[Validation] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    tables: list[LayerTable] = field(default_factory=list)
    heartbeats: list[tuple[str, str, int, float]] = field(default_factory=list)
    ends: list[tuple[RunEnd, Mapping[str, Any], Mapping[str, Sequence[float]]]] = field(default_factory=list)
    backlog: int = 0
    closed: bool = False

    def run_started(self, facts: RunFacts) -> None:
        self.started.append(facts)

    def window(self, facts: RunFacts, window: Window) -> None:
        self.windows.append(window)

    def validation(self, facts: RunFacts, validation: Validation) -> None:
        self.validations.append(validation)

    def finding(self, facts: RunFacts, finding: Finding) -> None:
        self.findings.append(finding)

    def layers(self, facts: RunFacts, table: LayerTable) -> None:
        self.tables.append(table)

    def heartbeat(self, facts: RunFacts, state: str, step: int, time: float) -> None:
        self.heartbeats.append((facts.run, state, step, time))

    def run_ended(
        self,
        facts: RunFacts,
        end: RunEnd,
        summary: Mapping[str, Any],
        last_steps: Mapping[str, Sequence[float]],
    ) -> None:
        self.ends.append((end, summary, last_steps))

    def pending(self) -> int:
        return self.backlog

    def close(self, deadline: float) -> None:
        self.closed = True


def _spread(value: float | Sequence[float], count: int) -> list[float]:
    return [float(value)] * count if isinstance(value, int | float) else [float(v) for v in value]
