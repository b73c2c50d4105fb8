"""``generalization-gap``: the run's own budget exceeded in three validations running."""

from __future__ import annotations

from typing import Any, Final

from gradwatch.catalog import Severity
from gradwatch.collect.model import Finding, Validation
from gradwatch.collect.run import Observation
from gradwatch.collect.validations import gap_budget, has_own_gap_budget
from gradwatch.detect.detector import found

CODE: Final = "generalization-gap"
IN_A_ROW: Final = 3


class GeneralizationGap:
    """The relative gap between validation and training above the budget that the run has set.

    Judged for each metric and slice: raised with the third validation in a row
    above budget, over with the first one within it. A ticket, a page for a
    production run. Where the run has set no budget of its own, above 10 % it is
    information: such a gap had 107 of 198 healthy runs. The definition of the gap is that of
    :mod:`gradwatch.collect.validations`.
    """

    codes = (CODE,)

    def __init__(self) -> None:
        #: (metric, slice) -> the gaps above budget in a row, the last of them.
        self._above: dict[tuple[str, str], tuple[int, list[float]]] = {}

    def observe(self, seen: Observation) -> list[Finding]:
        return [finding for validation in seen.told.validations for finding in self._judge(seen, validation)]

    def _judge(self, seen: Observation, validation: Validation) -> list[Finding]:
        assert seen.facts is not None
        findings = []
        for metric, gap in validation.gaps.items():
            key = (metric, validation.slice)
            budget = gap_budget(seen.facts.manifest.budgets, metric)
            count, gaps = self._above.get(key, (0, []))
            where = f" on slice {validation.slice!r}" if validation.slice else ""
            evidence: dict[str, Any] = {
                "step": validation.step,
                "metric": metric,
                "slice": validation.slice,
                "validation": validation.metrics[metric],
                "training": validation.training.get(metric),
                "budget": budget,
            }
            at = {"step": validation.step, "time": validation.time}
            if gap > budget:
                count, gaps = count + 1, [*gaps, gap][-IN_A_ROW:]
                self._above[key] = (count, gaps)
                if count == IN_A_ROW:
                    severity = self._severity(seen, metric)
                    told = ", ".join(f"{value:.1%}" for value in gaps)
                    message = (
                        f"{metric}{where}: the gap to training was {told} in three validations, budget {budget:.0%}."
                    )
                    evidence["gaps"] = gaps
                    findings.append(
                        found(CODE, seen, message=message, evidence=evidence, severity=severity, **at)  # type: ignore[arg-type]
                    )
            else:
                self._above.pop(key, None)
                if count >= IN_A_ROW:
                    message = f"{metric}{where}: the gap to training is {gap:.1%}, within the budget of {budget:.0%}."
                    findings.append(found(CODE, seen, message=message, evidence=evidence, active=False, **at))  # type: ignore[arg-type]
        return findings

    @staticmethod
    def _severity(seen: Observation, metric: str) -> Severity:
        assert seen.facts is not None
        if not has_own_gap_budget(seen.facts.manifest.budgets, metric):
            return "info"
        return "page" if seen.facts.manifest.tier == "production" else "ticket"

    def to_state(self) -> dict[str, Any]:
        return {"above": [[*key, count, gaps] for key, (count, gaps) in self._above.items()]}

    def restore(self, state: dict[str, Any]) -> None:
        self._above = {(m, s): (int(count), list(gaps)) for m, s, count, gaps in state["above"]}
