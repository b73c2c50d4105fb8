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
        self._refused: set[str] = set()

    def failed(self, error: BaseException, doing: str) -> None:
        """Note a failure; warn at the first, step aside for good at the last or where writing is impossible."""
        self.failures += 1
        self.last = "".join(format_exception_only(error)).strip()
        was_off, first = self.off, self.failures == 1
        if self.failures >= self._limit or isinstance(error, OSError):
            self.off = True
        if first or (self.off and not was_off):
            what = "nothing more is recorded" if self.off else "recording goes on"
            self.say(f"{doing} failed ({self.last}); training is not affected, {what}")

    def refused(self, error: BaseException, call: str) -> None:
        """What a loop handed to ``call`` was no use: said once for each call, and nothing else is lost."""
        if call not in self._refused:
            self._refused.add(call)
            told = "".join(format_exception_only(error)).strip()
            self.say(f"{call} was given what it cannot use and left it out ({told}); said once")

    def say(self, message: str) -> None:
        """One warning to the user; it never raises, not even under ``-W error``."""
        try:
            warnings.warn(f"gradwatch run {self.run}: {message}", RuntimeWarning, stacklevel=3)
        except Warning:
            pass
