"""A run read through once, from the oldest row to the newest, by whoever looks at it afterwards."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Final

from gradwatch.collect.run import Observation, RunTail
from gradwatch.journal import JournalError
from gradwatch.journal.layout import Place

#: Polls without news after which a journal that is still written is left as it is.
_QUIET: Final = 3

_log = logging.getLogger("gradwatch")


def tail_of(places: Sequence[Place]) -> RunTail:
    """A tail over attempts of one run."""
    run = RunTail(places[0].run, monotonic=time.monotonic, wall=time.time)
    for place in sorted(places, key=lambda place: (place.attempt, place.rank)):
        run.offer(place)
    return run


def read_through(run: RunTail) -> Iterator[Observation]:
    """All that the journals of a run hold; of a run under way, all that they hold by now. Lets go of the files.

    A rank that cannot be read is told in a warning and keeps none of the
    others from being read. Raises ``JournalError`` where nothing could be read.
    """
    quiet, anything = 0, False
    try:
        while not run.ended and quiet < _QUIET:
            seen = run.poll()
            yield from seen
            anything |= bool(seen)
            news = any(len(o.rows) or o.events or o.begun or o.closed for o in seen)
            quiet = 0 if news or run.more else quiet + 1
        if run.troubles and not anything:
            raise JournalError("; ".join(run.troubles))
        for trouble in run.troubles:
            _log.warning("left out: %s", trouble)
    finally:
        run.release()
