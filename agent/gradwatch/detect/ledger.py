"""All findings of a run: which were raised, how often, and which are active."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any, Final, cast

from gradwatch.catalog import Severity
from gradwatch.collect.model import Finding
from gradwatch.collect.run import Observation
from gradwatch.detect.calibration import CalibrationWorse
from gradwatch.detect.clip_rate import ClipRateHigh
from gradwatch.detect.clip_review import ClipNeedsReview, ClipNever
from gradwatch.detect.contract import ContractFindings
from gradwatch.detect.curves import Curves
from gradwatch.detect.detector import Detector
from gradwatch.detect.fitting import LeakageSuspected, Underfitting
from gradwatch.detect.gap import GeneralizationGap
from gradwatch.detect.gradient import GradientExploding, Saturated
from gradwatch.detect.learning import LossNotDecreasing, LossPlateau
from gradwatch.detect.loss import LossDiverging, LossSpike
from gradwatch.detect.nonfinite import Nonfinite
from gradwatch.detect.nonfinite_weight import NonfiniteWeight
from gradwatch.detect.overfitting import Overfitting
from gradwatch.detect.ranks import NormDiffersBetweenRanks
from gradwatch.detect.rate import EffectiveRateLow, LearningRateTooHigh
from gradwatch.detect.spike import GradientSpike

#: What watches the curves of an optimizer, block by block; the later ones see what the earlier ones told.
WATCHERS: Final = (
    LearningRateTooHigh,
    GradientExploding,
    Saturated,
    LossSpike,
    LossDiverging,
    LossNotDecreasing,
    LossPlateau,
    EffectiveRateLow,
    ClipRateHigh,
    ClipNever,
)

#: Every detector that an agent runs, in the order in which they look.
DETECTORS: Final[tuple[Callable[[], Detector], ...]] = (
    ContractFindings,
    Nonfinite,
    NonfiniteWeight,
    GradientSpike,
    lambda: Curves(WATCHERS),
    ClipNeedsReview,
    GeneralizationGap,
    Overfitting,
    Underfitting,
    LeakageSuspected,
    CalibrationWorse,
    NormDiffersBetweenRanks,
)
#: Findings of a run that are kept word for word; all are counted.
KEPT: Final = 200

_log = logging.getLogger("gradwatch.agent")


class Ledger:
    """Runs the detectors over a run and keeps what they find."""

    def __init__(self) -> None:
        self._detectors: list[Detector] = [make() for make in DETECTORS]
        #: The first and the newest findings, in order, as they were raised.
        self.findings: list[Finding] = []
        self.counts: dict[tuple[str, Severity], int] = {}
        #: code -> what it is about -> severity of the finding that is active.
        self._active: dict[str, dict[str, Severity]] = {}

    def observe(self, seen: Observation) -> list[Finding]:
        """Show every detector what was seen; return what was raised or resolved."""
        news: list[Finding] = []
        for detector in list(self._detectors):
            try:
                news += detector.observe(seen)
            except Exception:
                # A detector that fails on somebody's odd journal must not take the others along.
                _log.exception("detector-failed run=%s detector=%s", seen.facts and seen.facts.run, detector.codes)
                self._detectors.remove(detector)
        return [finding for finding in news if self._enter(finding)]

    def _enter(self, finding: Finding) -> bool:
        active = self._active.setdefault(finding.code, {})
        if not finding.active:
            return active.pop(_subject(finding), None) is not None
        active[_subject(finding)] = finding.severity
        key = (finding.code, finding.severity)
        self.counts[key] = self.counts.get(key, 0) + 1
        self.findings.append(finding)
        if len(self.findings) > KEPT:
            del self.findings[KEPT // 2]
        return True

    def is_active(self, code: str, severity: Severity) -> bool:
        return severity in self._active.get(code, {}).values()

    @property
    def active(self) -> Sequence[tuple[str, Severity]]:
        """Codes that are active now, with their severity."""
        return sorted({(code, severity) for code, subjects in self._active.items() for severity in subjects.values()})

    @property
    def all(self) -> list[Finding]:
        """The findings that are kept, in the order of their steps, ``active`` as they are now."""
        last = {(finding.code, _subject(finding)): index for index, finding in enumerate(self.findings)}
        told = [
            replace(f, active=last[f.code, _subject(f)] == index and _subject(f) in self._active.get(f.code, {}))
            for index, f in enumerate(self.findings)
        ]
        return sorted(told, key=lambda f: (f.attempt, f.step, f.time, f.rank, f.code))

    def to_state(self) -> dict[str, Any]:
        return {
            "detectors": {"/".join(detector.codes): detector.to_state() for detector in self._detectors},
            "findings": [asdict(finding) for finding in self.findings],
            "counts": [[code, severity, count] for (code, severity), count in self.counts.items()],
            "active": self._active,
        }

    def restore(self, state: dict[str, Any]) -> None:
        for detector in self._detectors:
            known = state["detectors"].get("/".join(detector.codes))
            if known is not None:
                detector.restore(known)
        self.findings = [Finding(**fields) for fields in state["findings"]]
        self.counts = {(code, cast(Severity, severity)): int(count) for code, severity, count in state["counts"]}
        self._active = {code: dict(subjects) for code, subjects in state["active"].items()}


def _subject(finding: Finding) -> str:
    """What a finding is about: a code may be active for one metric, optimizer or rank and over for another."""
    about = (finding.evidence.get(key, "") for key in ("optimizer", "metric", "slice"))
    return "/".join(str(part) for part in (finding.rank, *about))
