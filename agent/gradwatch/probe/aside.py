"""Stepping aside: whatever goes wrong in the probe, training does not notice."""

from __future__ import annotations

import warnings
from traceback import format_exception_only


class Aside:
    """Counts a run's failures and says the first one aloud.

    The loop is sacred: every entry point of the probe catches what it raises
    and hands it to :meth:`failed`. After ``limit`` failures the probe is off.
    """

    def __init__(self, run: str, limit: int = 10) -> None:
        self.run = run
        self.failures = 0
        self.last = ""
        self.off = False
        self._limit = limit

    def failed(self, error: BaseException, doing: str) -> None:
        """Note a failure; warn at the first, step aside for good at the last or where writing is impossible."""
        self.failures += 1
        self.last = "".join(format_exception_only(error)).strip()
        first = self.failures == 1
        if self.failures >= self._limit or isinstance(error, OSError):
            self.off = True
        if first:
            what = "records nothing more" if self.off else "goes on"
            self.say(f"{doing} failed ({self.last}); training is not affected, recording {what}")

    def say(self, message: str) -> None:
        """One warning to the user; it never raises, not even under ``-W error``."""
        try:
            warnings.warn(f"gradwatch run {self.run}: {message}", RuntimeWarning, stacklevel=3)
        except Warning:
            pass
