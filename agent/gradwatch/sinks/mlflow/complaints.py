"""What a sink says of its failures: at most one line a minute, with what was counted since."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from typing import Final

INTERVAL: Final = 60.0


class Complaints:
    """Counts failures and drops; usable from several threads."""

    def __init__(self, logger: logging.Logger, clock: Callable[[], float]) -> None:
        self._logger = logger
        self._clock = clock
        self._lock = threading.Lock()
        self._said_at = self._recovered_at = -math.inf
        self._unsaid = 0
        self._failing = False
        #: Deliveries that failed, and items that were given up, ever.
        self.errors = 0
        self.lost = 0

    def say(self, text: str) -> None:
        """Something that is said once by its nature."""
        self._logger.warning("mlflow: %s", text)

    def failed(self, text: str, waiting: int) -> None:
        """A delivery failed and will be tried again."""
        with self._lock:
            self.errors += 1
            self._unsaid += 1
            self._failing = True
            count = self._due()
        if count:
            self._logger.warning(
                "mlflow: %d failures, %d items wait and are tried again; last: %s", count, waiting, text
            )

    def dropped(self, count: int, why: str) -> None:
        """Items were given up; without ``why``, for a reason that was said."""
        with self._lock:
            self.lost += count
            self._unsaid += count if why else 0
            said = self._due() if why else 0
        if said:
            self._logger.warning("mlflow: %d items given up so far; last: %s", self.lost, why)

    def delivered(self) -> None:
        """A delivery went through."""
        with self._lock:
            now = self._clock()
            said = self._failing and now >= self._recovered_at + INTERVAL
            self._failing = False
            if said:
                self._recovered_at = now
        if said:
            self._logger.info("mlflow: delivering again after %d failures in all", self.errors)

    def _due(self) -> int:
        now = self._clock()
        if now < self._said_at + INTERVAL:
            return 0
        self._said_at = now
        count, self._unsaid = self._unsaid, 0
        return count
