"""Reading MLflow's history piece by piece, so that a poll costs the same at a hundred runs and at 10⁵.

MLflow has no feed of changes, so a poll asks four questions, most urgent first:

1. which runs stand at RUNNING (all of them, with heartbeat and state);
2. which ended since the last poll (by end time, reaching back 15 minutes);
3. what became of runs that stood at RUNNING and do no more: an agent that comes
   back from an outage tells an end that lies hours in the past;
4. a round over all runs that ended within the look-back, newest first, a page
   at a time: it fills the memory after a start, and finds what was deleted or
   told so late that no other question sees it.

Each gets a page in every poll, and more while there is time. A search that is not
through when the time is up goes on in the next poll.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from gradwatch.bridge.records import RunRecord, record_of
from gradwatch.sinks.mlflow.facts import Facts, facts_of
from gradwatch.sinks.mlflow.history import History, Page

_log = logging.getLogger("gradwatch.bridge")

#: Runs in one answer of the server.
PAGE: Final = 250
#: Seconds that the search for ended runs reaches back before the newest end that it knows.
OVERLAP: Final = 900.0
#: Runs that left RUNNING and are asked for one by one, in a poll.
MAX_DEPARTED: Final = 100
#: Runs at RUNNING that are kept; a server with more has another problem.
MAX_RUNNING: Final = 20_000
_NEWEST: Final = "attributes.end_time DESC"


@dataclass(slots=True)
class Newest:
    """The newest run of a model, which its current version is compared with."""

    start: float
    run_id: str
    facts: Facts


@dataclass(slots=True)
class Runs:
    """The runs that the bridge knows."""

    running: dict[str, RunRecord] = field(default_factory=dict)
    #: Runs of ours that ended within the look-back, by MLflow's id.
    ended: dict[str, RunRecord] = field(default_factory=dict)
    newest: dict[str, Newest] = field(default_factory=dict)
    #: Whether the look-back was read once from end to end; before, counts over it would be too low.
    complete: bool = False
    #: MLflow's id of the newest run of each run of gradwatch, with its start.
    ids: dict[str, tuple[float, str]] = field(default_factory=dict)

    def find(self, run: str) -> RunRecord | None:
        """The newest MLflow run of a run of gradwatch, among those known."""
        known = self.ids.get(run)
        return None if known is None else self.running.get(known[1]) or self.ended.get(known[1])


class Search:
    """A search over pages that can stop anywhere and go on later; ``done`` after its last page."""

    def __init__(self, fetch: Callable[[str | None], Page]) -> None:
        self._fetch = fetch
        self._token: str | None = None
        self.done = False
        self.seen: set[str] = set()

    def next(self) -> list[Any]:
        """The next page's runs."""
        page = self._fetch(self._token)
        self._token = page.token
        self.done = page.token is None
        self.seen.update(str(run.info.run_id) for run in page.items)
        return list(page.items)


class RunsPoll:
    """Keeps :class:`Runs` up to date, a bounded piece at each :meth:`poll`.

    Args:
        history: the server.
        look_back: seconds for which ended runs are counted.
        wall: Unix time.
    """

    def __init__(self, history: History, look_back: float, wall: Callable[[], float] = time.time) -> None:
        self._history = history
        self._look_back = look_back
        self._wall = wall
        self.runs = Runs()
        self.experiments: list[str] = []
        self._known_until = 0.0
        self._running: Search | None = None
        self._found: dict[str, RunRecord] = {}
        self._ended: Search | None = None
        self._round: Search | None = None
        self._before: set[str] = set()
        self._departed: dict[str, None] = {}

    def poll(self, in_time: Callable[[], bool]) -> None:
        """A page of each question, and further ones while ``in_time``. Raises ``TrackingError``."""
        self.experiments = self._history.experiments()
        self._read_running(in_time)
        self._read_ended(in_time)
        self._read_departed(in_time)
        self._read_round(in_time)
        self._forget()

    # -- the four questions

    def _read_running(self, in_time: Callable[[], bool]) -> None:
        if self._running is None:
            self._running, self._found = self._search("attributes.status = 'RUNNING'", "attributes.start_time DESC"), {}
        while True:
            for run in self._running.next():
                record = self._note(run)
                if record.status == "RUNNING" and len(self._found) < MAX_RUNNING:
                    self._found[record.run_id] = record
            if self._running.done or not in_time():
                break
        if self._running.done:
            left = self.runs.running.keys() - self._found.keys()
            self._departed |= {run_id: None for run_id in left if self.runs.running[run_id].is_ours}
            self.runs.running, self._running = self._found, None

    def _read_ended(self, in_time: Callable[[], bool]) -> None:
        if self._ended is None:
            since = max(self._known_until - OVERLAP, self._oldest()) if self._known_until else self._wall() - OVERLAP
            self._ended = self._search(f"attributes.end_time >= {int(since * 1000)}", _NEWEST)
        while True:
            for run in self._ended.next():
                self._note(run)
            if self._ended.done:
                newest = max((record.end for record in self.runs.ended.values()), default=0.0)
                # A clock of another machine may be ahead; what it calls the future must not hide the present.
                self._known_until = min(max(newest, self._known_until), self._wall())
                self._ended = None
                return
            if not in_time():
                return

    def _read_departed(self, in_time: Callable[[], bool]) -> None:
        for _ in range(MAX_DEPARTED):
            if not self._departed or not in_time():
                return
            run_id = next(iter(self._departed))
            run = self._history.run(run_id) if run_id not in self.runs.ended else None
            if run is not None:
                self._note(run)
            del self._departed[run_id]

    def _read_round(self, in_time: Callable[[], bool]) -> None:
        first = not self.runs.complete
        if self._round is None:
            self._round = self._search(f"attributes.end_time >= {int(self._oldest() * 1000)}", _NEWEST)
            self._before = set(self.runs.ended)
        while True:
            for run in self._round.next():
                self._note(run)
            if self._round.done:
                for run_id in self._before - self._round.seen:
                    # Not there any more, or moved between two pages; ask before forgetting.
                    self._departed[run_id] = None
                    self.runs.ended.pop(run_id, None)
                self.runs.complete, self._round = True, None
                return
            if not first or not in_time():
                return

    # -- records

    def _search(self, where: str, order: str) -> Search:
        return Search(lambda token: self._history.runs(self.experiments, where, order, PAGE, token))

    def _note(self, run: Any) -> RunRecord:
        """Keep what a run says."""
        record = record_of(run)
        if record.is_ours:
            if record.start >= self.runs.ids.get(record.run, (0.0, ""))[0]:
                self.runs.ids[record.run] = record.start, record.run_id
            newest = self.runs.newest.get(record.model)
            if newest is None or record.start > newest.start or record.run_id == newest.run_id:
                self.runs.newest[record.model] = Newest(record.start, record.run_id, facts_of(run))
        if record.is_ours and record.outcome is not None and record.end >= self._oldest():
            self.runs.ended[record.run_id] = record
        elif record.run_id in self.runs.ended:
            del self.runs.ended[record.run_id]  # it runs again
        return record

    def _oldest(self) -> float:
        return max(0.0, self._wall() - self._look_back)

    def _forget(self) -> None:
        oldest = self._oldest()
        for run_id in [run_id for run_id, record in self.runs.ended.items() if record.end < oldest]:
            del self.runs.ended[run_id]
        kept = self.runs.ended.keys() | self.runs.running.keys()
        if len(self.runs.ids) > 2 * len(kept) + 1000:
            self.runs.ids = {run: known for run, known in self.runs.ids.items() if known[1] in kept}
