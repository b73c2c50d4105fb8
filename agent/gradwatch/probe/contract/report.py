"""From a violation to a finding: said at once, counted on, repeated ever more rarely."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gradwatch.catalog import FINDING, Severity


class Report:
    """Writes contract findings of one run as events.

    A code's first violation is written at once, then its 2nd, 4th, 8th, ... with
    the count so far, so that a loop that is wrong at every step costs nothing.
    """

    def __init__(self, write: Callable[..., None]) -> None:
        self._write = write
        self._counts: dict[str, int] = {}
        self._first: dict[str, int] = {}

    def violation(
        self,
        code: str,
        step: int,
        message: str,
        evidence: Mapping[str, Any],
        *,
        severity: Severity | None = None,
    ) -> None:
        """Note a violation of contract ``code`` at ``step``."""
        count = self._counts.get(code, 0) + 1
        self._counts[code] = count
        first = self._first.setdefault(code, step)
        if count & (count - 1):
            return
        self._write(
            "finding",
            code=code,
            severity=severity or FINDING[code].severity,
            message=message,
            evidence={**evidence, "count": count},
            first_step=first,
            step=step,
        )

    def count(self, code: str) -> int:
        """Violations of a contract so far."""
        return self._counts.get(code, 0)
