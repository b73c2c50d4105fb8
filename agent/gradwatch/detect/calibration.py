"""``calibration-worse``: confidence drifts away from accuracy."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from gradwatch.collect.model import Finding, Validation
from gradwatch.collect.run import Observation
from gradwatch.detect.detector import budget, found

CODE: Final = "calibration-worse"
METRIC: Final = "ece"
MEDIAN: Final = 3
IN_A_ROW: Final = 3
WORSE: Final = 0.05
MAX_SLICES: Final = 50


class CalibrationWorse:
    """The expected calibration error of a slice is above its best.

    With the metric ``ece`` (computed by ``log_validation(probabilities=...,
    targets=...)`` or logged by the loop, 0 to 1): the median of three
    validations above the lowest such median by more than 0.05 (budget), that is,
    five points of confidence, and by half of it, in three validations in a row.
    Over when it is within half of that. Information: accuracy often goes on
    rising while calibration falls. Source: Guo et al. (2017), *On Calibration of
    Modern Neural Networks*.
    """

    codes = (CODE,)

    def __init__(self) -> None:
        #: slice -> last values, lowest median and its step, validations above in a row, whether it was told.
        self._slices: dict[str, tuple[list[float], float | None, int, int, bool]] = {}

    def observe(self, seen: Observation) -> list[Finding]:
        return [finding for validation in seen.told.validations for finding in self._judge(seen, validation)]

    def _judge(self, seen: Observation, validation: Validation) -> list[Finding]:
        value, name = validation.metrics.get(METRIC), validation.slice
        if value is None or not math.isfinite(value):
            return []
        if name not in self._slices and len(self._slices) >= MAX_SLICES:
            return []
        last, best, best_step, above, active = self._slices.get(name, ([], None, -1, 0, False))
        last = [*last, value][-MEDIAN:]
        findings: list[Finding] = []
        if len(last) == MEDIAN:
            middle = float(np.median(last))
            if best is None or middle < best:
                best, best_step = middle, validation.step
            rise = max(budget(seen, CODE, WORSE), 0.5 * best)
            above = above + 1 if middle - best > rise else 0
            where = f" on slice {name!r}" if name else ""
            evidence = {"step": validation.step, "metric": METRIC, "slice": name, "ece": middle, "best": best}
            evidence["best_step"] = best_step
            at: dict[str, Any] = {"step": validation.step, "time": validation.time, "evidence": evidence}
            if above == IN_A_ROW and not active:
                active = True
                message = (
                    f"The expected calibration error{where} is {middle:.3f} (median of three); at step {best_step} it "
                    f"was {best:.3f}."
                )
                findings.append(found(CODE, seen, message=message, **at))
            elif active and middle - best <= rise / 2:
                active = False
                message = f"The expected calibration error{where} is {middle:.3f}, near its best of {best:.3f}."
                findings.append(found(CODE, seen, message=message, active=False, **at))
        self._slices[name] = (last, best, best_step, above, active)
        return findings

    def to_state(self) -> dict[str, Any]:
        return {name: list(known) for name, known in self._slices.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self._slices = {name: (list(v), b, int(s), int(n), bool(a)) for name, (v, b, s, n, a) in state.items()}
