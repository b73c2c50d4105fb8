"""``nonfinite-gradient`` and ``nonfinite-loss``: exact, not statistical."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from gradwatch.collect.model import Finding
from gradwatch.collect.rows import Mask, Rows
from gradwatch.collect.run import Observation
from gradwatch.detect.detector import found
from gradwatch.journal.manifest import MAX_TENSORS

#: Steps in a row without another after which it is over.
CALM_STEPS: Final = 100
#: Steps in a row of which it becomes a page.
PAGE_STEPS: Final = 10
#: Rows with a loss in a row after which a missing one, together with broken gradients, is a NaN.
_REGULAR: Final = 3


class Nonfinite:
    """Steps that were taken with a NaN or infinite gradient or loss.

    Attempts that a GradScaler skipped are its normal work and no finding. One
    finding a series: it is active until 100 steps in a row were clean, and
    raised once more, as a page, when 10 steps in a row were broken. The
    evidence names the first tensors that were not finite, the step and the
    rank. A run's ranks are watched each by itself, for gradients.
    """

    codes = ("nonfinite-gradient", "nonfinite-loss")

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}
        self._with_loss = 0

    def observe(self, seen: Observation) -> list[Finding]:
        if seen.facts is None:
            return []
        rows = seen.rows.take(seen.rows.plausible & seen.rows.taken)
        if not len(rows):
            return []
        findings = self._watch("nonfinite-gradient", seen, rows, rows.nonfinite)
        if seen.rank == 0:
            findings += self._watch("nonfinite-loss", seen, rows, self._bad_losses(rows))
        return findings

    def _bad_losses(self, rows: Rows) -> Mask:
        """Losses that are NaN or infinite. The journal's NaN may also mean "not logged": where losses came with
        every step so far, a missing one beside a broken gradient is a NaN."""
        bad = rows.bad_loss.copy()
        known = ~np.isnan(rows["loss"])
        if not known.all():
            for index in np.flatnonzero(~known & ~bad).tolist():
                before = known[:index]
                run = int(np.argmax(~before[::-1])) if not before.all() else index + self._with_loss
                bad[index] = bool(rows.broken[index]) and run >= _REGULAR
        trailing = known[::-1]
        self._with_loss = self._with_loss + len(rows) if known.all() else int(np.argmax(~trailing))
        return bad

    def _watch(self, code: str, seen: Observation, rows: Rows, bad: Mask) -> list[Finding]:
        series = self._series.setdefault(f"{code}/{seen.rank}", _Series())
        if not bad.any():
            over = series.calm(len(rows))
            return [self._over(code, seen, rows, len(rows) - 1)] if over else []
        findings = []
        at = 0
        for index in np.flatnonzero(bad).tolist():
            if series.calm(index - at):
                findings.append(self._over(code, seen, rows, index - 1))
            at = index + 1
            if first := series.broken():
                severity = "page" if first == "page" else None
                findings.append(self._found(code, seen, rows, index, series.in_a_row, severity))
        if series.calm(len(rows) - at):
            findings.append(self._over(code, seen, rows, len(rows) - 1))
        return findings

    def _found(self, code: str, seen: Observation, rows: Rows, index: int, in_a_row: int, severity: Any) -> Finding:
        step, row = int(rows.step[index]), int(rows.sequence[index])
        evidence: dict[str, Any] = {"step": step, "rank": seen.rank, "steps_in_a_row": in_a_row}
        if code == "nonfinite-gradient":
            tensors = seen.broken.get(row, [])
            evidence |= {"tensors": int(min(rows["nonfinite"][index], MAX_TENSORS)), "first_tensors": tensors}
            where = f", first in {tensors[0]}" if tensors else ""
            what = f"{evidence['tensors']} tensors had a gradient with NaN or infinity{where}"
        else:
            evidence["gradient_broken"] = bool(rows.broken[index])
            what = f"the loss was {'infinite' if np.isinf(rows['loss'][index]) else 'NaN'}"
        again = f" ({in_a_row} steps in a row)" if in_a_row > 1 else ""
        message = f"At step {step} on rank {seen.rank} {what}{again}."
        time = float(rows.time[index])
        return found(code, seen, step=step, time=time, message=message, evidence=evidence, severity=severity)

    def _over(self, code: str, seen: Observation, rows: Rows, index: int) -> Finding:
        step, time = int(rows.step[index]), float(rows.time[index])
        message = f"{CALM_STEPS} steps in a row were finite."
        return found(code, seen, step=step, time=time, message=message, evidence={"step": step}, active=False)

    def to_state(self) -> dict[str, Any]:
        series = {key: [s.active, s.in_a_row, s.clean, s.paged] for key, s in self._series.items()}
        return {"series": series, "with_loss": self._with_loss}

    def restore(self, state: dict[str, Any]) -> None:
        self._series = {key: _Series(*values) for key, values in state["series"].items()}
        self._with_loss = int(state["with_loss"])


class _Series:
    """Broken steps in a row, and clean ones since."""

    def __init__(self, active: bool = False, in_a_row: int = 0, clean: int = 0, paged: bool = False) -> None:
        self.active, self.in_a_row, self.clean, self.paged = active, in_a_row, clean, paged

    def calm(self, steps: int) -> bool:
        """So many clean steps; whether that ends it."""
        if steps <= 0:
            return False
        self.in_a_row = 0
        self.clean += steps
        if self.active and self.clean >= CALM_STEPS:
            self.active = self.paged = False
            return True
        return False

    def broken(self) -> str:
        """One broken step: ``first``, ``page`` where it goes on, else ""."""
        self.in_a_row += 1
        self.clean = 0
        if not self.active:
            self.active = True
            return "first"
        if self.in_a_row >= PAGE_STEPS and not self.paged:
            self.paged = True
            return "page"
        return ""
