"""Findings of journals that no agent has watched: the same detectors, over what the files still hold."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from gradwatch.collect.model import Finding
from gradwatch.collect.run import RunTail
from gradwatch.detect.ledger import Ledger
from gradwatch.journal import JournalError, find_attempts
from gradwatch.journal.layout import MANIFEST, Place

#: Polls without news after which a journal that is still written is left as it is.
_QUIET: int = 3


def replay(path: Path) -> list[Finding]:
    """All findings below ``path``, in order of run and time.

    ``path`` is a root of journals, a run, a rank or one attempt. What a run
    says depends on its journal alone, so this is what an agent would have
    said, as far as the rings reach back. Findings that were resolved meanwhile
    have ``active=False``. Raises ``JournalError`` where there is no journal.
    """
    places = list(_places(path))
    if not places:
        raise JournalError(f"{path}: no journal of gradwatch here")
    runs: dict[str, RunTail] = {}
    for place in places:
        tail = runs.get(place.run)
        if tail is None:
            tail = runs[place.run] = RunTail(place.run, monotonic=time.monotonic, wall=time.time)
        tail.offer(place)
    findings = []
    for name in sorted(runs):
        findings += _findings(runs[name])
    return findings


def _findings(run: RunTail) -> list[Finding]:
    ledger = Ledger()
    quiet = 0
    try:
        while not run.ended and quiet < _QUIET:
            seen = run.poll()
            for observation in seen:
                ledger.observe(observation)
            news = any(len(o.rows) or o.events or o.begun or o.closed for o in seen)
            quiet = 0 if news or run.more else quiet + 1
            if not seen and run.troubles:
                raise JournalError("; ".join(run.troubles))
    finally:
        run.release()
    return ledger.all


def _places(path: Path) -> Iterable[Place]:
    """The attempts at or below a path, whichever of the journal's levels it is."""
    path = path.absolute()
    if (path / MANIFEST).is_file():
        return [place for place in find_attempts(path.parents[2]) if place.path == path]
    for levels in range(3):
        root = path if levels == 0 else path.parents[levels - 1]
        found = [place for place in find_attempts(root) if place.path.is_relative_to(path)]
        if found:
            return found
    return []
