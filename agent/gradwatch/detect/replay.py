"""Findings of journals that no agent has watched: the same detectors, over what the files still hold."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from gradwatch.collect.model import Finding
from gradwatch.collect.through import read_through, tail_of
from gradwatch.detect.ledger import Ledger
from gradwatch.journal import JournalError, find_attempts
from gradwatch.journal.layout import MANIFEST, Place

_log = logging.getLogger("gradwatch")


def replay(path: Path) -> list[Finding]:
    """All findings below ``path``, in order of run and time.

    ``path`` is a root of journals, a run, a rank or one attempt. What a run
    says depends on its journal alone, so this is what an agent would have
    said, as far as the rings reach back. Findings that were resolved meanwhile
    have ``active=False``. A rank or a run that cannot be read is left out with a warning.
    Raises ``JournalError`` where there is no journal, or none that can be read.
    """
    places = list(_places(path))
    if not places:
        raise JournalError(f"{path}: no journal of gradwatch here")
    runs: dict[str, list[Place]] = {}
    for place in places:
        runs.setdefault(place.run, []).append(place)
    findings: list[Finding] = []
    unreadable: list[str] = []
    for name in sorted(runs):
        ledger = Ledger()
        try:
            for observation in read_through(tail_of(runs[name])):
                ledger.observe(observation)
        except JournalError as error:
            unreadable.append(str(error))
        findings += ledger.all
    if len(unreadable) == len(runs):
        raise JournalError("; ".join(unreadable))
    for trouble in unreadable:
        _log.warning("left out: %s", trouble)
    return findings


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
