"""What a detector is: a function of the journal's stream, whose memory is kept with the fold.

A detector sees final rows and events in the order in which they were written,
in pieces of any size, and never the time of day; so what it says is the same
whether it watches, catches up, or is replayed over an old journal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from gradwatch.catalog import FINDING, Severity
from gradwatch.collect.model import Finding
from gradwatch.collect.run import Observation
from gradwatch.journal.manifest import Optimizer


class Detector(Protocol):
    """Watches one run."""

    @property
    def codes(self) -> tuple[str, ...]:
        """Findings that it may raise."""

    def observe(self, seen: Observation) -> list[Finding]:
        """Take in what one poll of one rank brought; return what was found, or is over (``active=False``)."""

    def to_state(self) -> dict[str, Any]:
        """Its memory, JSON-safe."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take up the memory of a former life."""


def found(
    code: str,
    seen: Observation,
    *,
    step: int,
    time: float,
    message: str,
    evidence: Mapping[str, Any],
    severity: Severity | None = None,
    advice: str = "",
    active: bool = True,
) -> Finding:
    """A finding with the catalogue's severity and advice, unless others are given."""
    known = FINDING[code]
    assert seen.facts is not None
    return Finding(
        code=code,
        severity=severity or known.severity,
        run=seen.facts.run,
        step=step,
        time=time,
        message=message,
        evidence=evidence,
        advice=advice or known.advice,
        rank=seen.rank,
        attempt=seen.attempt,
        active=active,
    )


def budget(seen: Observation, code: str, default: float) -> float:
    """What the run tolerates before ``code`` is raised, in the unit of the detector's own default: the number that
    the run has set for the code (``watch(budgets={code: ...})``), where it has set one that can be such."""
    assert seen.facts is not None
    value = seen.facts.manifest.budgets.get(code)
    sane = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    return float(value) if sane and value is not None else default


def optimizer_of(seen: Observation, index: int) -> Optimizer:
    """The optimizer of a row's index, for advice that fits it."""
    assert seen.facts is not None
    known = seen.facts.manifest.optimizers
    return known[index] if 0 <= index < len(known) else Optimizer("default")
