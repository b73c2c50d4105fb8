"""Reading journals in the process that writes them, as tests do and agents never."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gradwatch.collect import discovery, tail
from gradwatch.collect.run import Observation, RunTail
from gradwatch.journal import JournalReader, find_attempts
from gradwatch.testing import FakeClock, JournalBuilder


@pytest.fixture(autouse=True)
def builders_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process does not see its own record locks; ask the builders instead."""
    alive = JournalBuilder.open_directories
    monkeypatch.setattr(JournalReader, "alive", lambda self: self.directory in alive)
    monkeypatch.setattr(discovery, "is_live", lambda path: path in alive)
    monkeypatch.setattr(tail, "is_locked", lambda path: path.parent in alive)


def follow(root: Path, run: str = "run-1", clock: FakeClock | None = None) -> RunTail:
    """A tail of a run, with every attempt that is there by now."""
    clock = clock or FakeClock()
    followed = RunTail(run, monotonic=clock, wall=clock)
    offer(followed, root)
    return followed


def offer(followed: RunTail, root: Path) -> None:
    for place in find_attempts(root):
        if place.run == followed.run:
            followed.offer(place)


def read_on(followed: RunTail, clock: FakeClock | None = None) -> Sequence[Observation]:
    """Poll until a poll brings nothing; with a clock, the newest row is then old enough to be shown."""
    seen: list[Observation] = []
    quiet = 0
    while quiet < 2:
        polled = followed.poll()
        seen += polled
        news = any(len(o.rows) or o.events or o.begun or o.closed for o in polled)
        quiet = 0 if news or followed.more else quiet + 1
        if clock is not None:
            clock.advance(0.6)
    return seen
