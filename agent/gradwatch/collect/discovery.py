"""Finds runs as they appear below a root, at a price that stays small among thousands of old ones.

A directory whose modification time has not moved has no new entries, so it is
listed again only when it has; and the next look comes the later the longer the
last one took.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from os import DirEntry, scandir, stat_result
from pathlib import Path
from typing import Final

from gradwatch.journal import layout
from gradwatch.journal.layout import Place
from gradwatch.journal.liveness import is_locked

#: Attempts that are followed at most, and names that are kept of one directory; of more, the rest is left out and
#: said so. Names count by themselves, because directories without any attempt cost a look each as well.
MAX_PLACES: Final = 20_000
#: Seconds between two looks, and the most that looking may take of the time.
INTERVAL: Final = 0.25
SHARE: Final = 0.05
#: A directory that changed so short a time before it was listed may have changed again since, unseen.
_GRANULARITY_NS: Final = 2_000_000_000

_RANK: Final = re.compile(r"rank-(0|[1-9][0-9]{0,5})")
_ATTEMPT: Final = re.compile(r"attempt-(0|[1-9][0-9]{0,5})")


@dataclass(slots=True)
class _Listing:
    modified: int
    listed: int
    names: list[str]


class Discovery:
    """Looks for attempts below ``root``; tells each once."""

    def __init__(self, root: Path, monotonic: Callable[[], float], wall: Callable[[], float]) -> None:
        self.root = root
        #: Whether there is more than will be followed.
        self.full = False
        self._monotonic, self._wall = monotonic, wall
        self._listings: dict[str, _Listing] = {}
        self._seen: set[tuple[str, int, int]] = set()
        self._next = 0.0

    def look(self, at_once: bool = False) -> list[Place]:
        """Attempts that are new since the last look; nothing where it is too early to look, unless ``at_once``."""
        began = self._monotonic()
        if began < self._next and not at_once:
            return []
        found = []
        present: set[str] = set()
        for place in self._walk(present):
            key = (place.run, place.rank, place.attempt)
            if key in self._seen:
                continue
            if len(self._seen) >= MAX_PLACES:
                self.full = True
                break
            self._seen.add(key)
            found.append(place)
        for path in self._listings.keys() - present:
            del self._listings[path]
        now = self._monotonic()
        self._next = now + max(INTERVAL, (now - began) / SHARE)
        return found

    def forget(self, run: str) -> None:
        """A run is no longer followed and its directory is gone: were it to come back, it would be told again."""
        self._seen = {key for key in self._seen if key[0] != run}

    def _walk(self, present: set[str]) -> Iterator[Place]:
        for run in self._names(self.root, layout.RUN_NAME, present):
            for rank in self._names(self.root / run, _RANK, present):
                for attempt in self._names(self.root / run / rank, _ATTEMPT, present):
                    path = self.root / run / rank / attempt
                    yield Place(run, int(rank.partition("-")[2]), int(attempt.partition("-")[2]), path)

    def _names(self, path: Path, pattern: re.Pattern[str], present: set[str]) -> list[str]:
        """Names of real directories (no links) in ``path``; what cannot be listed is empty."""
        key = str(path)
        try:
            status: stat_result = path.lstat()
        except OSError:
            return []
        present.add(key)
        known = self._listings.get(key)
        fresh = known is not None and known.modified == status.st_mtime_ns
        if known is not None and fresh and known.listed - known.modified > _GRANULARITY_NS:
            return known.names
        listed = int(self._wall() * 1e9)
        try:
            with scandir(path) as entries:
                fitting = (entry.name for entry in entries if pattern.fullmatch(entry.name) and _is_directory(entry))
                names = list(islice(fitting, MAX_PLACES + 1))
        except OSError:
            return []
        if len(names) > MAX_PLACES:
            # Those that were known stay: what fills a directory must not push out the runs that were there before.
            before = [] if known is None else [name for name in known.names if _is_real(path / name)]
            names = list(dict.fromkeys([*before, *names]))[:MAX_PLACES]
            self.full = True
        self._listings[key] = _Listing(status.st_mtime_ns, listed, names)
        return names


def _is_directory(entry: DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _is_real(path: Path) -> bool:
    """Whether a directory is there, and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def last_touched(path: Path) -> float:
    """When an attempt was last written, by the times of its files and its directory (which is made before them)."""
    times = [0.0]
    for place in (path, path / layout.MANIFEST, path / layout.STEPS, path / layout.EVENTS):
        try:
            times.append(place.lstat().st_mtime)
        except OSError:
            continue
    return max(times)


def is_live(path: Path) -> bool:
    """Whether somebody writes there."""
    return is_locked(path / layout.LOCK)
