"""The agent's loop: look for runs, follow each, keep its state, let go of what is over."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gradwatch import __version__
from gradwatch.agent.followed import Followed
from gradwatch.agent.store import Store
from gradwatch.collect.discovery import Discovery, is_live, last_touched
from gradwatch.collect.life import boot_id
from gradwatch.collect.model import Sink
from gradwatch.collect.run import RunTail
from gradwatch.journal.layout import Place
from gradwatch.journal.reader import SETTLE_SECONDS
from gradwatch.sinks.prometheus import Exposition, SinkCounts, Snapshot

#: Seconds between two polls, and between two writes of a run's state.
POLL_SECONDS: Final = 0.25
SAVE_SECONDS: Final = 1.0
#: For how long an ended run is shown by an agent that stays.
SHOWN_SECONDS: Final = 3600.0
#: Runs that are followed at once; what comes beyond waits until one is over.
MAX_RUNS: Final = 2_000
#: For how long an agent that nobody has ever scraped serves the end of its last run.
UNSCRAPED_SECONDS: Final = 2.0
#: Polls of a run that was just found.
_FIRST_POLLS: Final = 3
#: Of the grace period, what is kept for the sinks when runs are followed to their end first.
_DELIVER_SECONDS: Final = 5.0
#: A loop that has not come round for so long is not well.
HEALTHY_SECONDS: Final = 60.0

_log = logging.getLogger("gradwatch.agent")


@dataclass(frozen=True, slots=True)
class Settings:
    """What an agent is told to do."""

    root: Path
    #: Whether to leave when every run seen has ended.
    until_done: bool = False
    #: Seconds for the sinks to deliver when the agent is told to leave.
    grace: float = 25.0
    #: Seconds for which the final state waits for its scrape, where something scrapes.
    linger: float = 45.0
    #: Whether, told to leave, to follow the runs to their end first; within the grace period.
    drain: bool = False


class Agent:
    """Follows every run below a root, until told to stop or until all are done.

    One thread reads and folds (:meth:`run`, or :meth:`tick` by tick); scrapes
    come on others and take the same lock for as long as it takes to look.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        sinks: Sequence[Sink] = (),
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.settings, self.store, self.sinks = settings, store, list(sinks)
        self.lock = threading.RLock()
        self.runs: dict[str, Followed] = {}
        #: Runs that ended more than an hour ago, before this agent came: not followed, not shown.
        self.old = 0
        self.exposition = Exposition(self.snapshot, self.lock)
        self.address = ""
        self._monotonic, self._wall, self._pause = monotonic, wall, pause
        self._boot_id = boot_id()
        self._discovery = Discovery(settings.root, monotonic, wall)
        self._places: dict[str, list[Place]] = {}
        self._waiting: dict[str, None] = {}
        self._stop = threading.Event()
        self._seen_any = False
        self._full_told = False
        self._scraped_at: float | None = None
        self._said: dict[str, Any] = {}
        self._turned_at = monotonic()

    # -- the loop

    def run(self) -> None:
        """Work until :meth:`stop` is called, or all is done where that was asked."""
        while not self._stop.is_set():
            began = self._monotonic()
            more = self.tick()
            if self.settings.until_done and self._done():
                break
            if not more:
                self._stop.wait(max(0.01, POLL_SECONDS - (self._monotonic() - began)))

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def step_back(self) -> None:
        """All is done: keep everything and say that nobody listens here, before the directory's lock is given up."""
        for followed in list(self.runs.values()):
            self._save(followed, now=True)
        self.store.unsay()
        self._said = {}

    def something_new(self) -> bool:
        """Whether a run has begun that counted on this agent: its journal stood before it asked for the lock."""
        with self.lock:
            known = len(self.runs)
            self._discover(at_once=True)
            return len(self.runs) > known or bool(self._waiting) or not all(f.over for f in self.runs.values())

    def catch_up(self, seconds: float = 60.0) -> None:
        """Read all that is there by now, before anybody is answered; bounded, since a writer may be faster than this.

        A former agent may have counted, and shown, the newest row of a run that goes on; the reader keeps it back
        for half a second. A counter that is shown must never be less than it was: Prometheus would take it for one
        that began anew at zero.
        """
        until = self._monotonic() + seconds
        while self.tick() and self._monotonic() < until and not self._stop.is_set():
            pass
        if any(followed.resumed and not followed.over for followed in self.runs.values()):
            settled = self._monotonic() + SETTLE_SECONDS + POLL_SECONDS
            while self._monotonic() < settled and not self._stop.is_set():
                self._stop.wait(POLL_SECONDS / 2)
                self.tick()

    def stop(self) -> None:
        """Ask the loop to end; safe in a signal handler."""
        self._stop.set()

    def tick(self) -> bool:
        """One round over everything; whether more can be read at once."""
        self._turned_at = self._monotonic()
        with self.lock:
            self._discover()
        more = False
        for followed in list(self.runs.values()):
            with self.lock:
                try:
                    more |= self._poll(followed)
                except Exception:
                    # Whatever one run's journal brought about, the others go on.
                    _log.exception("run-failed run=%s: it is no longer followed", followed.run)
                    self._drop(followed)
                    continue
            self._save(followed)
        with self.lock:
            self._note_drained()
            self._retire()
        self._say()
        return more

    def _poll(self, followed: Followed) -> bool:
        more = followed.poll()
        # A run that is over when it is found is read to its end at once: thousands of them must not be open together.
        for _ in range(_FIRST_POLLS if followed.fresh else 0):
            if followed.over:
                break
            more = followed.poll()
        followed.fresh = False
        return more

    def _done(self) -> bool:
        """Whether every run seen has ended, is delivered, and was shown long enough."""
        if not self._seen_any or self._waiting or not all(followed.over for followed in self.runs.values()):
            return False
        if any(sink.pending() for sink in self.sinks):
            return False
        ended = [followed for followed in self.runs.values() if followed.ended_at is not None]
        if all(followed.scraped for followed in ended):
            return True
        since = self._monotonic() - max(followed.ended_at or 0.0 for followed in ended)
        return since > (UNSCRAPED_SECONDS if self._scraped_at is None else self.settings.linger)

    def leave(self) -> None:
        """Deliver what is left within the grace period, keep the state, let go."""
        deadline = self._monotonic() + self.settings.grace
        if self.settings.drain:
            self._follow_to_the_end(deadline - _DELIVER_SECONDS)
        for followed in list(self.runs.values()):
            self._save(followed, now=True)
        for sink in self.sinks:
            try:
                sink.close(deadline)
            except Exception:
                _log.exception("sink-failed sink=%s what=close", sink.name)
        with self.lock:
            self._note_drained()
            left = sum(sink.pending() for sink in self.sinks)
            for followed in list(self.runs.values()):
                self._save(followed, now=True)
                followed.tail.release()
        if self._said:
            self.store.unsay()
        _log.info("leave runs=%d undelivered=%d", len(self.runs), left)

    def _follow_to_the_end(self, deadline: float) -> None:
        """Read, deliver and show how the runs ended: a sidecar is told last, after its trainer."""
        with self.lock:
            self._discover(at_once=True)
        while self._seen_any and self._monotonic() < deadline:
            more = self.tick()
            if self._done():
                break
            if not more:
                self._pause(POLL_SECONDS)

    # -- runs come and go

    def _discover(self, at_once: bool = False) -> None:
        fresh: dict[str, None] = {}
        for place in self._discovery.look(at_once):
            self._places.setdefault(place.run, []).append(place)
            fresh[place.run] = None
        if self._discovery.full and not self._full_told:
            self._full_told = True
            _log.warning(
                "too-many-attempts dir=%s: what is beyond the first ones found is not followed; remove old runs",
                self.settings.root,
            )
        for run in [*self._waiting, *fresh]:
            followed = self.runs.get(run)
            if followed is not None:
                for place in self._places[run]:
                    followed.tail.offer(place)
            elif len(self.runs) >= MAX_RUNS:
                self._waiting[run] = None
            else:
                self._waiting.pop(run, None)
                self._follow(run)

    def _follow(self, run: str) -> None:
        places = self._places[run]
        state = self.store.load(run)
        undelivered = state is not None and state.get("drained") is None
        if not undelivered and self._is_old(places):
            self.old += 1
            return
        followed = self._new(run, places)
        if state is not None:
            try:
                followed.restore(state)
            except Exception as error:
                _log.warning("state-unusable run=%s %s: %s; reading its journal anew", run, type(error).__name__, error)
                followed.tail.release()
                followed = self._new(run, places)
        self.runs[run] = followed
        self._seen_any = True
        _log.info("follow run=%s ranks=%d resumed=%s", run, len(followed.tail.ranks), state is not None)

    def _new(self, run: str, places: Sequence[Place]) -> Followed:
        tail = RunTail(run, monotonic=self._monotonic, wall=self._wall, boot_id=self._boot_id)
        for place in places:
            tail.offer(place)
        return Followed(tail, self.sinks, self._monotonic, self._wall)

    def _is_old(self, places: Sequence[Place]) -> bool:
        newest = max(last_touched(place.path) for place in places)
        return self._wall() - newest > SHOWN_SECONDS and not any(is_live(place.path) for place in places)

    def _retire(self) -> None:
        """Ended runs leave after an hour; one that starts again is found again."""
        if self.settings.until_done:
            return
        now = self._monotonic()
        for followed in list(self.runs.values()):
            ended = followed.ended_at
            if ended is not None and followed.over and now - ended > SHOWN_SECONDS:
                self._save(followed, now=True)
                self._drop(followed)
                _log.info("retire run=%s", followed.run)

    def _drop(self, followed: Followed) -> None:
        followed.tail.release()
        del self.runs[followed.run]

    # -- what is kept and said

    def _save(self, followed: Followed, now: bool = False) -> None:
        if not followed.dirty:
            return
        if not now and self._monotonic() - followed.saved_at < SAVE_SECONDS:
            return
        with self.lock:
            state = followed.to_state()
            followed.dirty, followed.saved_at = False, self._monotonic()
        try:
            self.store.save(followed.run, state)
        except (OSError, ValueError) as error:
            followed.dirty = True
            _log.warning("state-not-saved run=%s %s", followed.run, error)

    def _note_drained(self) -> None:
        if any(sink.pending() for sink in self.sinks):
            return
        for followed in self.runs.values():
            if followed.drained is None and followed.ended_at is not None and followed.over:
                followed.drained, followed.dirty = self._wall(), True

    def _say(self) -> None:
        drained = {run: followed.drained for run, followed in self.runs.items() if followed.drained is not None}
        document = {"address": self.address, "pid": os.getpid(), "version": __version__, "drained": drained}
        if document != self._said:
            try:
                self.store.say(document)
                self._said = document
            except OSError as error:
                _log.warning("address-not-written %s", error)

    # -- what is shown

    def snapshot(self) -> Snapshot:
        """The present state of every run, for a scrape; take :attr:`lock` while looking at it."""
        sinks = [
            SinkCounts(sink.name, getattr(sink, "errors", 0), sink.pending(), getattr(sink, "dropped", 0))
            for sink in self.sinks
        ]
        return Snapshot([(followed.tail, followed.ledger) for followed in self.runs.values()], sinks)

    def ends_shown(self) -> list[Followed]:
        """Runs whose end a scrape that is made now shows."""
        with self.lock:
            return [followed for followed in self.runs.values() if followed.ended_at is not None]

    def was_scraped(self, ends: Sequence[Followed]) -> None:
        """A scrape was answered, with these runs at their end: they need not wait for another."""
        with self.lock:
            self._scraped_at = self._monotonic()
            for followed in ends:
                followed.scraped = True

    @property
    def healthy(self) -> bool:
        """Whether the loop turns: it has, within a minute, come round."""
        return self._monotonic() - self._turned_at < HEALTHY_SECONDS
