"""Contract findings: the probe's own, from the journal's events, with the catalogue's advice."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, cast

from gradwatch.catalog import FINDING, FINDINGS, Severity
from gradwatch.collect.model import Finding
from gradwatch.collect.run import Observation
from gradwatch.detect.detector import found
from gradwatch.journal.manifest import clean_text

_SEVERITIES: Final = ("info", "ticket", "page")
_MAX_EVIDENCE: Final = 32


class ContractFindings:
    """Passes on ``finding`` and ``resolved`` events of the probe.

    A code that is not in the catalogue, as a newer trainer may send, is left
    out: the catalogue is the closed set of what alerts and dashboards know.
    """

    codes = tuple(finding.code for finding in FINDINGS if finding.kind == "contract")

    def observe(self, seen: Observation) -> list[Finding]:
        if seen.facts is None:
            return []
        return [
            self._pass_on(seen, event)
            for event in seen.events
            if event["kind"] in ("finding", "resolved") and str(event.get("code")) in FINDING
        ]

    def _pass_on(self, seen: Observation, event: dict[str, Any]) -> Finding:
        code = str(event["code"])
        told, first = event.get("severity"), event.get("first_step")
        step = first if isinstance(first, int) else event.get("step")
        time = event.get("time")
        message = event.get("message")
        return found(
            code,
            seen,
            step=step if isinstance(step, int) and abs(step) < 2**53 else -1,
            time=float(time) if isinstance(time, int | float) and math.isfinite(time) else 0.0,
            message=clean_text(message) if isinstance(message, str) and message else FINDING[code].title,
            evidence=_clean(event.get("evidence")),
            severity=cast(Severity, told) if told in _SEVERITIES else None,
            active=event["kind"] == "finding",
        )

    def to_state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """It remembers nothing."""


def _clean(evidence: object, depth: int = 3) -> Mapping[str, Any]:
    """Evidence as bounded, harmless JSON."""
    if not isinstance(evidence, dict):
        return {}
    return {clean_text(key, 100): _value(value, depth) for key, value in list(evidence.items())[:_MAX_EVIDENCE]}


def _value(value: Any, depth: int) -> Any:
    if isinstance(value, bool | float) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else float(value) if abs(value) < 2**1000 else None
    if isinstance(value, list) and depth:
        return [_value(item, depth - 1) for item in value[:_MAX_EVIDENCE]]
    if isinstance(value, dict) and depth:
        return _clean(value, depth - 1)
    return clean_text(value, 500)
