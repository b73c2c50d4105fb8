"""``nonfinite-weight``: a weight is NaN or infinite. Exact, as often as weights are sampled."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

from gradwatch.catalog import Severity
from gradwatch.collect.model import Finding
from gradwatch.collect.rows import I64
from gradwatch.collect.run import Observation
from gradwatch.detect.detector import found

CODE: Final = "nonfinite-weight"
#: Samples in a row of which it becomes a page.
PAGE_SAMPLES: Final = 2
_NAMED: Final = 8


class NonfiniteWeight:
    """The weights of a rank hold NaN or infinity.

    Read from the samples (steps 0, 1, 2, 4, … 64, then every hundredth), whose
    weight norms are infinite where a tensor holds such a value. The evidence
    names the first such tensors in the order of the model, their number, the
    step, the rank, the last sampled step at which all were finite, and the first
    step since then that was taken with a broken gradient, which is where the
    weights were lost if there is one. A ticket with the first sample, a page
    with the second in a row; over with the first sample that is clean. Each
    rank is watched by itself: the shards of another one are not seen here.
    """

    codes = (CODE,)

    def __init__(self) -> None:
        self._ranks: dict[int, _Rank] = {}

    def observe(self, seen: Observation) -> list[Finding]:
        if seen.facts is None:
            return []
        rank = self._ranks.setdefault(seen.rank, _Rank())
        if seen.begun:
            rank.begin()
        rows = seen.rows.take(seen.rows.plausible & seen.rows.nonfinite)
        rank.waiting += _samples(seen)
        until = int(seen.rows.sequence[-1]) if len(seen.rows) else -1
        findings: list[Finding] = []
        at = 0
        while rank.waiting and (seen.closed or rank.waiting[0].row <= until):
            # The weights of a sample are those before its own step.
            stop = int(np.searchsorted(rows.sequence, rank.waiting[0].row))
            rank.note_broken(rows.step[at:stop])
            at = max(at, stop)
            findings += self._look(seen, rank, rank.waiting.pop(0))
        rank.note_broken(rows.step[at:])
        return findings

    @staticmethod
    def _look(seen: Observation, rank: _Rank, sample: _Sample) -> list[Finding]:
        step, time = sample.step, sample.time
        if not sample.tensors:
            rank.last_finite, rank.broken = step, None
            over, rank.in_a_row = rank.in_a_row > 0, 0
            if not over:
                return []
            message = f"At step {step} all weights of rank {seen.rank} were finite."
            evidence: dict[str, Any] = {"step": step}
            return [found(CODE, seen, step=step, time=time, message=message, evidence=evidence, active=False)]
        rank.in_a_row += 1
        if rank.in_a_row not in (1, PAGE_SAMPLES):
            return []
        evidence = {
            "step": step,
            "rank": seen.rank,
            "tensors": sample.tensors,
            "first_tensors": sample.names,
            "last_finite_step": rank.last_finite if rank.last_finite >= 0 else None,
            "first_broken_gradient_step": rank.broken,
        }
        since = "" if rank.last_finite < 0 else f"; at step {rank.last_finite} all were finite"
        how = "" if rank.broken is None else f", and step {rank.broken} was taken with a broken gradient"
        message = (
            f"At step {step} on rank {seen.rank} {sample.tensors} tensors of weights held NaN or infinity, first in "
            f"{sample.names[0]}{since}{how}."
        )
        severity: Severity | None = "page" if rank.in_a_row == PAGE_SAMPLES else None
        return [found(CODE, seen, step=step, time=time, message=message, evidence=evidence, severity=severity)]

    def to_state(self) -> dict[str, Any]:
        return {str(rank): known.to_state() for rank, known in self._ranks.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self._ranks = {int(rank): _Rank.from_state(known) for rank, known in state.items()}


class _Sample(NamedTuple):
    """What a sample says: the row that it is of, how many tensors are broken, and the first of them."""

    row: int
    step: int
    time: float
    tensors: int
    names: list[str]


class _Rank:
    """One rank: samples that wait for the rows before them, and what was since the last clean one."""

    def __init__(self) -> None:
        self.waiting: list[_Sample] = []
        #: Samples with broken weights in a row, and the step of the last clean one.
        self.in_a_row, self.last_finite = 0, -1
        #: The first step that was taken with a broken gradient since then.
        self.broken: int | None = None

    def begin(self) -> None:
        """A new attempt: it begins with the weights of a checkpoint."""
        self.waiting, self.last_finite, self.broken = [], -1, None

    def note_broken(self, steps: I64) -> None:
        if self.broken is None and len(steps):
            self.broken = int(steps[0])

    def to_state(self) -> list[Any]:
        return [[list(sample) for sample in self.waiting], self.in_a_row, self.last_finite, self.broken]

    @classmethod
    def from_state(cls, state: list[Any]) -> _Rank:
        self = cls()
        waiting, self.in_a_row, self.last_finite, self.broken = state
        self.waiting = [_Sample(*sample) for sample in waiting]
        return self


def _samples(seen: Observation) -> list[_Sample]:
    """The samples of a poll in which weights were measured."""
    tensors = seen.manifest.tensors
    weights = next((section for section in seen.manifest.sections if section.name == "weight_norm"), None)
    if weights is None or weights.size != len(tensors):
        return []
    samples = []
    for index in range(len(seen.samples)):
        norms = seen.samples.values[index, weights.offset : weights.offset + weights.size]
        if np.isnan(norms).all():
            continue
        broken = np.flatnonzero(np.isinf(norms))
        samples.append(
            _Sample(
                row=int(seen.samples.row[index]),
                step=int(seen.samples.step[index]),
                time=float(seen.samples.time[index]),
                tensors=len(broken),
                names=[tensors[i].name for i in broken[:_NAMED].tolist()],
            )
        )
    return samples
