"""A run's journals as arrays: what the pages and figures of a report are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradwatch.collect.model import RunEnd, RunFacts, Validation
from gradwatch.collect.rows import F64, I64, REPLAYED, Mask, Rows
from gradwatch.collect.through import read_through, tail_of
from gradwatch.journal import JournalError, JournalReader
from gradwatch.journal.layout import Place
from gradwatch.journal.manifest import Manifest, Tensor

#: Tensors whose curves are kept; of a larger model those with the largest weights.
MAX_TENSORS: Final = 400

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Steps:
    """Attempted steps of one optimizer over all attempts, in the order in which they were taken.

    ``norm`` is the pre-clip, unscaled global norm that training used;
    ``rates`` and ``decays`` hold a column for each parameter group, NaN where
    an attempt had none.
    """

    attempt: I64
    step: I64
    time: F64
    loss: F64
    norm: F64
    threshold: F64
    coefficient: F64
    clipped: Mask
    taken: Mask
    nonfinite: Mask
    replayed: Mask
    duration: F64
    loss_scale: F64
    rates: Mapping[str, F64]
    decays: Mapping[str, F64]

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, slots=True)
class Tensors:
    """Facts of tensors at some steps: a row a step, a column a tensor; NaN where not measured."""

    tensors: Sequence[Tensor]
    #: Pre-clip gradient norms, at every step that the ring still holds.
    grad_step: I64
    grad_norm: F32
    #: Weight and update norms, at sampled steps.
    sample_step: I64
    weight_norm: F32
    update_norm: F32
    #: Counts of \|w\| in ``buckets`` buckets, (samples, tensors, buckets); empty where none were taken.
    histogram: F32
    #: Global values of each sample.
    global_weight_norm: F64
    global_update_ratio: F64

    @property
    def update_ratio(self) -> F32:
        """‖Δw‖ / ‖w‖ of each tensor; NaN where the weights are zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.weight_norm > 0, self.update_norm / self.weight_norm, np.nan).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Record:
    """Everything that the journals of a run hold, as far as their rings reach back."""

    facts: RunFacts
    end: RunEnd | None
    #: By name, in the manifest's order.
    optimizers: Mapping[str, Steps]
    validations: Sequence[Validation]
    tensors: Tensors
    manifests: Sequence[Manifest]
    #: First step of each attempt behind the first.
    restarts: Sequence[int]
    #: Rows that were overwritten before the report was made.
    missed: int

    @property
    def main(self) -> Steps:
        """The steps of the first optimizer."""
        return next(iter(self.optimizers.values()))


def read(places: Sequence[Place]) -> Record:
    """Read the journals of one run. Raises ``JournalError`` where nothing of it can be read."""
    if not places:
        raise JournalError("no journal to report on")
    tail = tail_of(places)
    lead = min(tail.ranks)
    pieces: list[tuple[int, Rows]] = []
    validations: list[Validation] = []
    for seen in read_through(tail):
        if seen.rank == lead:
            if len(seen.rows):
                pieces.append((seen.attempt, seen.rows.take(seen.rows.plausible)))
            validations += seen.told.validations
    facts = tail.fold.facts
    if facts is None:
        raise JournalError(f"{places[0].path}: rank 0 of this run has no journal here")
    missed = sum(rank.missed for rank in tail.ranks.values())
    attempts = [place for place in places if place.rank == lead]
    manifests, tensors = _tensors(sorted(attempts, key=lambda place: place.attempt))
    first = {attempt: int(rows.step[0]) for attempt, rows in reversed(pieces) if len(rows)}
    return Record(
        facts=facts,
        end=tail.end,
        optimizers=_by_optimizer(pieces, facts.manifest),
        validations=validations,
        tensors=tensors,
        manifests=manifests,
        restarts=[first[attempt] for attempt in sorted(first)[1:]],
        missed=missed,
    )


def _by_optimizer(pieces: Sequence[tuple[int, Rows]], manifest: Manifest) -> dict[str, Steps]:
    found = {}
    for index, optimizer in enumerate(manifest.optimizers):
        own = [(attempt, rows.take(rows.optimizer == index)) for attempt, rows in pieces]
        own = [(attempt, rows) for attempt, rows in own if len(rows)]
        names = [str(group.get("name") or i) for i, group in enumerate(optimizer.groups)]
        found[optimizer.name or "default"] = _steps(own, names)
    return found


def _steps(pieces: Sequence[tuple[int, Rows]], groups: Sequence[str]) -> Steps:
    def column(pick: str) -> F64:
        return _joined([rows[pick] for _, rows in pieces])

    def mask(which: Sequence[Mask]) -> Mask:
        return np.concatenate(which) if which else np.empty(0, np.bool_)

    steps = [rows.step for _, rows in pieces]
    return Steps(
        attempt=np.repeat([attempt for attempt, _ in pieces], [len(rows) for _, rows in pieces]).astype(np.int64),
        step=np.concatenate(steps) if steps else np.empty(0, np.int64),
        time=_joined([rows.time for _, rows in pieces]),
        loss=column("loss"),
        norm=_joined([np.where(rows.broken, np.nan, rows.norm) for _, rows in pieces]),
        threshold=column("clip_threshold"),
        coefficient=column("clip_coefficient"),
        clipped=mask([rows.clipped for _, rows in pieces]),
        taken=mask([rows.taken for _, rows in pieces]),
        nonfinite=mask([rows.broken | rows.bad_loss for _, rows in pieces]),
        replayed=mask([(rows.flags & REPLAYED) != 0 for _, rows in pieces]),
        duration=column("duration"),
        loss_scale=column("loss_scale"),
        rates={name: _first_known(column(f"lr_{i}"), column(f"lr_tensor_{i}")) for i, name in enumerate(groups)},
        decays={name: column(f"wd_{i}") for i, name in enumerate(groups)},
    )


def _first_known(one: F64, other: F64) -> F64:
    return np.where(np.isnan(one), other, one)


def _joined(parts: Sequence[F64]) -> F64:
    return np.concatenate(parts) if parts else np.empty(0)


def _tensors(places: Sequence[Place]) -> tuple[list[Manifest], Tensors]:
    """Manifests of all attempts, and the tensors of the last one over those attempts that have the same."""
    manifests: list[Manifest] = []
    grads: list[tuple[Manifest, I64, F32]] = []
    samples: list[tuple[Manifest, I64, F32]] = []
    for place in places:
        try:
            reader = JournalReader(place.path)
        except JournalError:
            continue
        try:
            manifests.append(reader.manifest)
            while True:
                read = reader.poll()
                grads.append((reader.manifest, read.tensors.step, read.tensors.values))
                samples.append((reader.manifest, read.samples.step, read.samples.values))
                if not read.more:
                    break
        finally:
            reader.close()
    if not manifests:
        raise JournalError(f"{places[-1].path}: no attempt of this run can be read")
    last = manifests[-1]
    names = [tensor.name for tensor in last.tensors]

    def same(manifest: Manifest) -> bool:
        return [tensor.name for tensor in manifest.tensors] == names and manifest.sections == last.sections

    grads = [part for part in grads if same(part[0])]
    samples = [part for part in samples if same(part[0])]
    grad_step = np.concatenate([part[1] for part in grads])
    grad = np.concatenate([part[2] for part in grads]) if grads else np.empty((0, len(names)), np.float32)
    sample_step = np.concatenate([part[1] for part in samples])
    values = np.concatenate([part[2] for part in samples])
    kept = _largest(last.tensors)

    def section(name: str) -> F32:
        found = next((s for s in last.sections if s.name == name), None)
        if found is None or values.shape[1] < found.offset + found.size:
            return np.empty((len(values), 0), np.float32)
        return values[:, found.offset : found.offset + found.size]

    def by_tensor(name: str) -> F32:
        part = section(name)
        return part[:, kept] if part.shape[1] == len(names) else np.full((len(values), len(kept)), np.nan, np.float32)

    overall = section("global").astype(np.float64)
    overall = overall if overall.shape[1] >= 4 else np.full((len(values), 4), np.nan)
    counts = section("histogram")
    buckets = counts.shape[1] // len(names) if names else 0
    return manifests, Tensors(
        tensors=[last.tensors[i] for i in kept],
        grad_step=grad_step,
        grad_norm=grad[:, kept],
        sample_step=sample_step,
        weight_norm=by_tensor("weight_norm"),
        update_norm=by_tensor("update_norm"),
        histogram=counts.reshape(len(values), len(names), buckets)[:, kept],
        global_weight_norm=overall[:, 1],
        global_update_ratio=overall[:, 3],
    )


def _largest(tensors: Sequence[Tensor]) -> list[int]:
    """Positions of the tensors that are shown: all, or the largest, in the model's order."""
    if len(tensors) <= MAX_TENSORS:
        return list(range(len(tensors)))
    by_size = sorted(range(len(tensors)), key=lambda i: -tensors[i].numel)
    return sorted(by_size[:MAX_TENSORS])


def flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Hyperparameters as text, in order of their names."""
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in sorted(values.items())}
