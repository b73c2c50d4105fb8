"""``norm-differs-between-ranks``: ranks that should clip by the same norm do not."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from gradwatch.collect.model import Finding
from gradwatch.collect.run import Observation
from gradwatch.detect.detector import found

CODE: Final = "norm-differs-between-ranks"
#: Relative difference between the largest and the smallest norm: bf16 resolves 2**-8 of a value.
TOLERANCE: Final = 2.0**-7
IN_A_ROW: Final = 3
CALM_ROWS: Final = 100
_WAITING: Final = 2_048


class NormDiffersBetweenRanks:
    """Ranks of one attempt write the same rows; the global norm that each used must be the same.

    Compared row by row where all ranks of the world are read here. Raised with
    the third row in a row in which norms differ by more than 2⁻⁷ of the
    largest, over after 100 rows in which they do not. Rows without a norm or
    with a broken gradient are passed over, and so are all where a rank was
    watched from a later step on.
    """

    codes = (CODE,)

    def __init__(self) -> None:
        self._attempt = -1
        #: Where each rank's rows begin, as a count of collectives.
        self._begin: dict[int, int] = {}
        #: row -> norm of each rank that was read so far.
        self._rows: dict[int, dict[int, float]] = {}
        self._differing = self._same = 0
        self._active = False

    def observe(self, seen: Observation) -> list[Finding]:
        if seen.facts is None or seen.facts.manifest.world_size < 2 or seen.attempt < self._attempt:
            return []
        if seen.attempt > self._attempt:
            self._attempt, self._rows, self._begin = seen.attempt, {}, {}
        self._begin[seen.rank] = seen.manifest.collectives
        if len(set(self._begin.values())) > 1:
            return []  # rows of different steps
        world = seen.facts.manifest.world_size
        rows = seen.rows
        used = rows["grad_norm"]
        findings: list[Finding] = []
        for index in np.flatnonzero(np.isfinite(used) & rows.plausible).tolist():
            row = int(rows.sequence[index])
            norms = self._rows.setdefault(row, {})
            norms[seen.rank] = float(used[index])
            if len(norms) >= world:
                del self._rows[row]
                findings += self._compare(seen, int(rows.step[index]), float(rows.time[index]), norms)
        while len(self._rows) > _WAITING:
            del self._rows[next(iter(self._rows))]
        return findings

    def _compare(self, seen: Observation, step: int, time: float, norms: dict[int, float]) -> list[Finding]:
        largest, smallest = max(norms.values()), min(norms.values())
        if largest - smallest > TOLERANCE * largest:
            self._differing, self._same = self._differing + 1, 0
            if self._active or self._differing < IN_A_ROW:
                return []
            self._active = True
            shown = {str(rank): norms[rank] for rank in sorted(norms)[:16]}
            message = (
                f"At step {step} ranks clipped by norms from {smallest:.4g} to {largest:.4g}, "
                f"{IN_A_ROW} steps in a row; replicas drift apart."
            )
            return [found(CODE, seen, step=step, time=time, message=message, evidence={"step": step, "norms": shown})]
        self._differing, self._same = 0, self._same + 1
        if self._active and self._same >= CALM_ROWS:
            self._active = False
            message = f"Ranks have agreed for {CALM_ROWS} steps."
            evidence = {"step": step}
            return [found(CODE, seen, step=step, time=time, message=message, evidence=evidence, active=False)]
        return []

    def to_state(self) -> dict[str, Any]:
        rows = [[row, list(norms.items())] for row, norms in self._rows.items()]
        return {"attempt": self._attempt, "rows": rows, "series": [self._differing, self._same, self._active]}

    def restore(self, state: dict[str, Any]) -> None:
        self._attempt = int(state["attempt"])
        self._rows = {int(row): {int(rank): float(norm) for rank, norm in norms} for row, norms in state["rows"]}
        self._differing, self._same, self._active = state["series"]
