"""Follows one rank of a run: its attempts one after the other, each from its first row to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from gradwatch.collect.combine import is_sharded
from gradwatch.collect.life import awaits_status, exit_of, is_settled, parents_word, told_end
from gradwatch.collect.line import Line, Progress
from gradwatch.collect.model import RunEnd
from gradwatch.collect.rows import Rows
from gradwatch.collect.witness import Witness
from gradwatch.journal import JournalError, JournalReader, PayloadRows
from gradwatch.journal.exits import Exit
from gradwatch.journal.layout import LOCK
from gradwatch.journal.liveness import is_locked
from gradwatch.journal.manifest import Manifest

#: Rows of each ring that one poll takes at most: some 20 ms of work.
ROWS_A_POLL: Final = 4_096
#: An attempt that cannot be opened is tried again after 0.25, 0.5, 1, … seconds, at most this many.
MAX_BACKOFF: Final = 30.0
#: An attempt that cannot be opened for so long is given up, where nobody writes it or a later one exists.
GIVE_UP_SECONDS: Final = 10.0
#: For how long a writer that has told its end may still hold its lock.
LINGER_SECONDS: Final = 2.0
#: For how long the parent's word is waited for, once the lock of the process that it started is free: it is
#: killed then, or, where it has told an end, the interpreter still takes itself down, which takes torch seconds.
PARENT_SECONDS: Final = 3.0
TEARDOWN_SECONDS: Final = 30.0
#: For how long the kernel's word is waited for, which comes when the process has been reaped.
KERNEL_SECONDS: Final = 1.0
#: Tensors that are named for one broken row, and broken rows that are remembered.
_NAMED: Final = 8
_BROKEN_ROWS: Final = 128


@dataclass(slots=True)
class Polled:
    """What one poll of a rank brought. ``begun`` is the manifest where this is the first of an attempt."""

    attempt: int
    progress: Progress
    tensors: PayloadRows
    samples: PayloadRows
    events: list[dict[str, Any]]
    more: bool
    begun: Manifest | None = None
    #: Whether the attempt is over: nothing more will come of it.
    closed: bool = False


@dataclass(slots=True)
class RankTail:
    """The journals of one rank, attempt by attempt."""

    rank: int
    clock: Callable[[], float]
    missed: int = 0
    #: Why the present attempt cannot be read, in words; "" where it can.
    trouble: str = ""
    #: The end that the present (or last) attempt told.
    end: RunEnd | None = None
    #: What its parent, or the kernel, told of the end of the present (or last) attempt's process.
    word: Exit | None = None
    manifest: Manifest | None = None
    #: Row of ``steps.ring`` -> names of tensors that were not finite there.
    broken: dict[int, list[str]] = field(default_factory=dict)
    alive: bool = False
    #: Whether this rank holds shards of tensors.
    sharded: bool = False
    reader: JournalReader | None = None
    attempt: int = -1
    #: The last attempt that was read to its end.
    done: int = -1
    line: Line = field(default_factory=Line)
    _places: dict[int, Path] = field(default_factory=dict)
    _cursor: dict[str, Any] | None = None
    _retry_at: float = 0.0
    _backoff: float = 0.25
    _troubled_since: float | None = None
    _quiet_since: float | None = None
    _gone_since: float | None = None
    _superseded_since: float | None = None
    #: Who stands by the writing process, and whether that was tried.
    _witness: Witness | None = None
    _stood_by: bool = False

    def offer(self, attempt: int, path: Path) -> bool:
        """An attempt was found; whether it is new here."""
        if attempt < self.done or attempt in self._places:
            return False
        self._places[attempt] = path
        self._retry_at = 0.0
        return True

    @property
    def finished(self) -> bool:
        """Whether every attempt that was offered has been read to its end."""
        return self.reader is None and all(attempt <= self.done for attempt in self._places)

    def poll(self) -> Polled | None:
        """Read on; None where there is nothing to read from."""
        begun = None
        if self.reader is None:
            begun = self._open_next()
        if self.reader is None:
            return None
        # Asked before reading: what a writer wrote before it was gone is then in what is read.
        self.alive = self.reader.alive()
        if self.alive and not self._stood_by:
            self._stood_by, self._witness = True, Witness.of(self.reader.writer_pid)
        try:
            read = self.reader.poll(ROWS_A_POLL)
        except JournalError as error:
            # Its files are gone or broken under it: what was read stands, and no more will come.
            self.trouble = str(error)
            return self._lost()
        self.missed += read.missed
        for event in read.events:
            if event["kind"] == "end":
                self.end = told_end(event)
        self._note_broken(read.tensors)
        quiet = not (len(read.steps) or len(read.events) or read.more)
        closed = (quiet and self._is_over()) or (not read.more and self._is_outlived())
        progress = self.line.feed(Rows.of(read.steps, self.sharded), Rows.of(read.amended), closed)
        if closed:
            self._close()
        return Polled(
            self.attempt, progress, read.tensors, read.samples, read.events, read.more, begun=begun, closed=closed
        )

    def _lost(self) -> Polled:
        assert self.reader is not None
        assert self.manifest is not None
        none = np.empty(0, np.int64)
        columns = self.reader.columns
        nothing = Rows(columns, none, none, np.empty(0), np.empty((0, len(columns))), self.sharded)
        progress = self.line.feed(nothing, nothing, closed=True)
        self._close()
        width = max((section.offset + section.size for section in self.manifest.sections), default=0)
        tensors, samples = _no_rows(len(self.manifest.tensors)), _no_rows(width)
        return Polled(self.attempt, progress, tensors, samples, [], more=False, closed=True)

    def _is_over(self) -> bool:
        """Nothing came: whether nothing can come any more."""
        if not self.alive:
            return self._others_have_spoken()
        superseded = any(attempt > self.attempt for attempt in self._places)
        if self.end is None and not superseded:
            self._quiet_since = None
            return False
        if self._quiet_since is None:
            self._quiet_since = self.clock()
        return self.clock() - self._quiet_since > LINGER_SECONDS

    def _others_have_spoken(self) -> bool:
        """The lock is free: whether parent or kernel told how, cannot know better, or had their time."""
        assert self.manifest is not None
        if is_settled(self.end) or self.path is None:
            return True
        if self._gone_since is None:
            self._gone_since = self.clock()
        waited = self.clock() - self._gone_since
        if self.manifest.parent:
            self.word = parents_word(self.manifest, self.path)
            if self.word is not None:
                return True
            if waited <= (PARENT_SECONDS if self.end is None else TEARDOWN_SECONDS):
                return False
        if self._witness is None:
            return True
        status = self._witness.status()
        if status is not None:
            self.word = exit_of(status, self.manifest)
            return True
        if self.end is None:
            return waited > KERNEL_SECONDS
        # Who called `finish` may train something else for hours; an interpreter that leaves is gone in seconds.
        return not awaits_status(self.end) or waited > TEARDOWN_SECONDS

    def _is_outlived(self) -> bool:
        """Whether a later attempt has been there for a while: it speaks for the run, though this one's writer lives."""
        if not any(attempt > self.attempt for attempt in self._places):
            self._superseded_since = None
            return False
        if self._superseded_since is None:
            self._superseded_since = self.clock()
        return self.clock() - self._superseded_since > GIVE_UP_SECONDS

    def _open_next(self) -> Manifest | None:
        waiting = sorted(attempt for attempt in self._places if attempt > self.done)
        if not waiting or self.clock() < self._retry_at:
            return None
        attempt = waiting[0]
        cursor = self._cursor if attempt == self.attempt else None
        try:
            reader = JournalReader(self._places[attempt], cursor, clock=self.clock)
        except JournalError as error:
            self._failed(str(error), attempt, superseded=len(waiting) > 1)
            return None
        resumed = attempt == self.attempt
        self._cursor, self.trouble, self._backoff, self._troubled_since = None, "", 0.25, None
        self.reader, self.manifest, self.attempt, self._quiet_since = reader, reader.manifest, attempt, None
        self.sharded = is_sharded(reader.manifest)
        if resumed:
            return None
        self.line, self.end, self.broken = Line(), None, {}
        self.word, self._gone_since = None, None
        self._dismiss()
        if self.rank == 0 and self.sharded and reader.manifest.world_size > 1:
            self.line.global_norm = _not_yet
        return reader.manifest

    def _dismiss(self) -> None:
        if self._witness is not None:
            self._witness.close()
        self._stood_by, self._witness = False, None

    def _failed(self, error: str, attempt: int, superseded: bool) -> None:
        now = self.clock()
        self.trouble = error
        if self._troubled_since is None:
            self._troubled_since = now
        hopeless = superseded or not is_locked(self._places[attempt] / LOCK)
        if hopeless and now - self._troubled_since > GIVE_UP_SECONDS:
            self.done, self._troubled_since = attempt, None
        self._retry_at, self._backoff = now + self._backoff, min(MAX_BACKOFF, 2 * self._backoff)

    def _close(self) -> None:
        assert self.reader is not None
        self.reader.close()
        self.reader, self.done, self.alive = None, self.attempt, False
        self._dismiss()
        self._places = {attempt: path for attempt, path in self._places.items() if attempt >= self.attempt}

    def _note_broken(self, tensors: PayloadRows) -> None:
        if not len(tensors) or self.manifest is None:
            return
        for index in np.flatnonzero(np.isinf(tensors.values).any(axis=1))[-_BROKEN_ROWS:].tolist():
            which = np.flatnonzero(np.isinf(tensors.values[index]))[:_NAMED].tolist()
            self.broken[int(tensors.row[index])] = [self.manifest.tensors[i].name for i in which]
        while len(self.broken) > _BROKEN_ROWS:
            del self.broken[next(iter(self.broken))]

    @property
    def path(self) -> Path | None:
        """Where the present (or last) attempt lies."""
        return self._places.get(self.attempt)

    def read_manifest(self) -> Manifest:
        """The manifest of the attempt that a state speaks of. Raises ``JournalError`` where it is gone."""
        if self.path is None:
            raise JournalError(f"rank {self.rank}: attempt {self.attempt} is gone")
        reader = JournalReader(self.path)
        reader.close()
        self.manifest, self.sharded = reader.manifest, is_sharded(reader.manifest)
        return reader.manifest

    def read_manifests(self) -> dict[int, Manifest]:
        """The manifests of the attempts that are here, as far as they can be read."""
        manifests = {}
        for attempt, path in self._places.items():
            try:
                reader = JournalReader(path)
            except JournalError:
                continue
            reader.close()
            manifests[attempt] = reader.manifest
        return manifests

    def release(self) -> None:
        """Let go of open files; the tail is done with."""
        self._dismiss()
        if self.reader is not None:
            self.reader.close()
            self.reader = None

    # -- between two lives of the agent

    def to_state(self) -> dict[str, Any]:
        """Where to go on: at the first row that is not final."""
        cursor = self._cursor
        if self.reader is not None:
            cursor = self.reader.cursor
            if self.line.first_open is not None:
                cursor["steps"] = self.line.first_open
        return {
            "attempt": self.attempt,
            "done": self.done,
            "missed": self.missed,
            "counted": self.line.counted,
            "cursor": cursor,
            "end": None if self.end is None else {k: getattr(self.end, k) for k in RunEnd.__dataclass_fields__},
            "broken": {str(row): names for row, names in self.broken.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.attempt, self.done, self.missed = int(state["attempt"]), int(state["done"]), int(state["missed"])
        self.line = Line(int(state["counted"]))
        self._cursor = state["cursor"]
        self.end = None if state["end"] is None else RunEnd(**state["end"])
        self.broken = {int(row): list(names) for row, names in state["broken"].items()}


def _no_rows(width: int) -> PayloadRows:
    none = np.empty(0, np.uint64)
    return PayloadRows(none, none, none.astype(np.int64), np.empty(0), np.empty((0, width), np.float32))


def _not_yet(_row: int) -> None:
    """The global norm of a sharded run before the other ranks have been joined."""
