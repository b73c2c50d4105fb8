"""Reading a journal while it is written, or long after.

Only ``pread``, nothing mapped, nothing written; every size is proved before it
is used. A row is shown once its checksum fits and it is final; what a slow
reader missed is counted.
"""

from __future__ import annotations

import os
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradwatch.journal import layout, liveness
from gradwatch.journal.errors import JournalError
from gradwatch.journal.events import EventTail
from gradwatch.journal.manifest import MAX_BYTES, Manifest, parse
from gradwatch.journal.ring import RingGeometry
from gradwatch.journal.tail import RingTail, Slots, column, columns, pread

#: How long a row may still gain values before it is shown as it is.
SETTLE_SECONDS: Final = 0.5
#: How many shown rows are looked at again for values that arrive late.
LATE_ROWS: Final = 64

F64 = npt.NDArray[np.float64]
F32 = npt.NDArray[np.float32]
U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StepRows:
    """Rows of ``steps.ring`` in order; ``values`` has a column for each of ``columns``, NaN where unknown."""

    columns: tuple[str, ...]
    sequence: U64
    step: I64
    time: F64
    values: F64

    def __len__(self) -> int:
        return len(self.sequence)

    def __getitem__(self, column: str) -> F64:
        """A column by name; NaN throughout where this journal has none of that name."""
        try:
            return self.values[:, self.columns.index(column)]
        except ValueError:
            return np.full(len(self), np.nan)


@dataclass(frozen=True, slots=True)
class PayloadRows:
    """Rows of ``tensors.ring`` or ``samples.ring``; ``row`` names the row of ``steps.ring`` that each is of."""

    sequence: U64
    row: U64
    step: I64
    time: F64
    values: F32

    def __len__(self) -> int:
        return len(self.sequence)


@dataclass(frozen=True, slots=True)
class Events:
    """What one poll of a journal brought."""

    steps: StepRows
    #: Rows shown before whose second part has changed since (a late loss, device columns that have landed).
    amended: StepRows
    tensors: PayloadRows
    samples: PayloadRows
    events: list[dict[str, Any]]
    #: Rows of ``steps.ring`` that were overwritten or torn before this reader saw them.
    missed: int
    #: Whether more can be read at once (the poll was cut at its limit).
    more: bool
    #: Events that were rotated away before this reader saw them.
    events_missed: int = 0


class JournalReader:
    """Tails one attempt's journal from a cursor."""

    def __init__(
        self,
        directory: Path,
        cursor: dict[str, Any] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Open a journal. Raises ``JournalError`` for one that is not (yet) whole, foreign or damaged.

        ``cursor`` is what :attr:`cursor` gave an earlier reader; without one,
        or with one of another journal, reading begins at the oldest row that
        the rings still hold. ``directory`` and the two above it must not be
        symbolic links.
        """
        self.directory = directory
        self._clock = clock
        self._fds: list[int] = []
        try:
            self._fds.append(layout.open_attempt(directory))
            data = pread(self._open(layout.MANIFEST), MAX_BYTES + 1, 0)
            os.close(self._fds.pop())
            self.manifest: Manifest = parse(data, str(directory / layout.MANIFEST))
            self._steps = self._ring(layout.STEPS)
            self._tensors = self._ring(layout.TENSORS)
            self._samples = self._ring(layout.SAMPLES)
            self._check_place()
            self._check_columns()
        except OSError as error:
            self.close()
            raise JournalError(f"{error.filename or directory}: {error.strerror or error}") from None
        except JournalError:
            self.close()
            raise
        self._own_lock = liveness.holds(layout.LOCK, self._fds[0])
        # Kept open: a question must not depend on there being a free descriptor, nor on the file's still being there.
        self._lock = liveness.open_question(layout.LOCK, self._fds[0])
        if self._lock is not None:
            self._fds.append(self._lock)
        self.columns = self.manifest.host_columns + self.manifest.device_columns
        self._log = EventTail(self._fds[0])
        #: What the newest row was at former polls, as far back as tells which rows have had their time.
        self._newest: deque[tuple[float, int]] = deque()
        self._late = min(LATE_ROWS, self._steps.geometry.capacity)
        #: The last rows shown, and the checksum of the second part that was shown (-1: none).
        self._recent = np.empty((0, 2), np.int64)
        self._identity = zlib.crc32(data)
        if cursor and cursor.get("journal", self._identity) == self._identity:
            self._restore(cursor)

    # -- opening

    def _open(self, name: str) -> int:
        try:
            self._fds.append(layout.open_regular(name, self._fds[0]))
        except OSError as error:
            error.filename = self.directory / name
            raise
        return self._fds[-1]

    def _ring(self, name: str) -> RingTail:
        return RingTail(self._open(name), str(self.directory / name))

    def _check_place(self) -> None:
        """A journal speaks for the attempt in whose directory it lies, for no other."""
        place, said = layout.place_of(self.directory), self.manifest
        if place and (place.run, place.rank, place.attempt) != (said.run, said.rank, said.attempt):
            raise JournalError(
                f"{self.directory}: its manifest speaks for run {said.run!r}, rank {said.rank}, "
                f"attempt {said.attempt}; move it to that directory or delete it"
            )

    def _check_columns(self) -> None:
        steps, tensors, samples = self._steps.geometry, self._tensors.geometry, self._samples.geometry
        manifest, count = self.manifest, len(self.manifest.tensors)
        sizes = {
            "weight_norm": count,
            "update_norm": count,
            "state_norm": 2 * count,
            "histogram": manifest.buckets * count,
        }
        width = max((s.offset + s.size for s in manifest.sections), default=0)
        fits = (
            (steps.host, steps.device, steps.width) == (len(manifest.host_columns), len(manifest.device_columns), 8)
            and (tensors.host, tensors.device, tensors.width) == (0, count, 4)
            and (samples.host, samples.device, samples.width) == (0, width, 4)
            and all(s.size == sizes.get(s.name, s.size) for s in manifest.sections)
        )
        if not fits:
            raise JournalError(f"{self.directory}: the rings' columns are not the manifest's; delete the attempt")

    # -- reading

    def alive(self) -> bool:
        """Whether the writer lives: another process, or this one."""
        if self._own_lock:
            return liveness.holds(layout.LOCK, self._fds[0])
        return self._lock is not None and liveness.is_held(self._lock)

    def writer_pid(self) -> int | None:
        """The writer's process, where it lives, is another one, and is seen from this PID namespace."""
        return None if self._own_lock or self._lock is None else liveness.holder(self._lock)

    def poll(self, limit: int = 16_384) -> Events:
        """What has come since the last poll, at most ``limit`` rows of each ring.

        A row is kept back while its writer lives and it may still change: the
        newest, whose loss may still come, and one whose device columns have
        not arrived, each for half a second at most. What comes later yet is in
        ``amended``, once for each change. Rows of the other rings are not kept
        back: they can arrive before the row of ``steps`` that they are of.
        Raises ``JournalError`` where the files cannot be read any more.
        """
        try:
            return self._poll(limit)
        except OSError as error:
            raise JournalError(f"{self.directory}: {error.strerror or error}") from None

    def _poll(self, limit: int) -> Events:
        # Asked first: once the lock is free, all that was ever written is there to be read.
        ended = not self.alive()
        block = self._steps.read(limit, ended=ended)
        whole = self._steps.second_part_fits(block)
        kept = self._final(block, whole, ended)
        self._steps.advance(block[:kept])
        amended = self._amended()
        self._remember(block[:kept], whole[:kept])
        tensors = self._tensors.take(limit, ended=ended)
        samples = self._samples.take(limit, ended=ended)
        events, events_missed = self._log.read()
        return Events(
            steps=self._step_rows(block[:kept], whole[:kept]),
            amended=amended,
            tensors=_payload_rows(tensors, self._tensors.geometry),
            samples=_payload_rows(samples, self._samples.geometry),
            events=events,
            missed=self._steps.take_missed(),
            more=self._steps.cut or self._tensors.cut or self._samples.cut or self._log.cut,
            events_missed=events_missed,
        )

    def last_steps(self, count: int) -> StepRows:
        """The last ``count`` rows that still stand, final or not, without moving the cursor."""
        try:
            parts = [self._step_rows(b, self._steps.second_part_fits(b)) for b in self._steps.newest(count)]
        except OSError as error:
            raise JournalError(f"{self.directory}: {error.strerror or error}") from None
        return StepRows(
            self.columns,
            np.concatenate([p.sequence for p in parts])[-count:],
            np.concatenate([p.step for p in parts])[-count:],
            np.concatenate([p.time for p in parts])[-count:],
            np.concatenate([p.values for p in parts])[-count:],
        )

    def _final(self, block: Slots, whole: npt.NDArray[np.bool_], ended: bool) -> int:
        """How many rows of a block are final: up to the first that may still gain values."""
        if not len(block) or ended or self._steps.cut:
            return len(block)  # a reader that is behind waits for nothing: what is late is an amendment
        sequence, now = column(block, 0, np.uint64), self._clock()
        self._newest.append((now, int(sequence[-1])))
        while len(self._newest) > 1 and now - self._newest[1][0] >= SETTLE_SECONDS:
            self._newest.popleft()
        since, newest = self._newest[0]
        settled = newest if now - since >= SETTLE_SECONDS else 0
        done = whole.copy()
        done[-1] = False
        open_rows = np.flatnonzero(~done & (sequence > settled))
        return int(open_rows[0]) if len(open_rows) else len(block)

    def _step_rows(self, block: Slots, whole: npt.NDArray[np.bool_]) -> StepRows:
        geometry = self._steps.geometry
        values = np.full((len(block), geometry.host + geometry.device), np.nan)
        values[:, : geometry.host] = columns(block, 32, geometry.host, np.float64)
        values[whole, geometry.host :] = columns(block[whole], geometry.second + 8, geometry.device, np.float64)
        return StepRows(
            self.columns,
            column(block, 0, np.uint64),
            column(block, 16, np.int64),
            column(block, 24, np.float64),
            values,
        )

    def _checksums(self, block: Slots, whole: npt.NDArray[np.bool_]) -> I64:
        return np.where(whole, column(block, self._steps.geometry.second_crc, np.uint32).astype(np.int64), -1)

    def _remember(self, block: Slots, whole: npt.NDArray[np.bool_]) -> None:
        """Keep in mind the last rows shown, with their second part's checksum, to notice what comes late."""
        if len(block):
            shown = np.stack((column(block, 0, np.uint64).astype(np.int64), self._checksums(block, whole)), axis=1)
            recent = np.concatenate((self._recent, shown[-self._late :]))
            self._recent = recent[recent[:, 0] > recent[-1, 0] - self._late]

    def _amended(self) -> StepRows:
        """Rows shown before, of which the second part is another one now."""
        first = int(self._recent[0, 0]) if len(self._recent) else 1
        last = int(self._recent[-1, 0]) if len(self._recent) else 0
        block = self._steps.slots(first, last + 1 - first)
        recent = self._recent[self._recent[:, 0] < first + len(block)]
        block = block[recent[:, 0] - first]
        stands = column(block, 0, np.uint64).astype(np.int64) == recent[:, 0]
        changed = stands & (column(block, self._steps.geometry.second_crc, np.uint32) != recent[:, 1])
        changed = self._steps.second_part_fits(block, self._steps.first_part_fits(block, changed))
        self._recent[: len(recent)][changed, 1] = self._checksums(block, changed)[changed]
        return self._step_rows(block[changed], changed[changed])

    # -- the cursor

    @property
    def cursor(self) -> dict[str, Any]:
        """Where the next poll begins, JSON-safe: keep it beside what was made of the rows."""
        return {
            "journal": self._identity,
            "steps": self._steps.next,
            "tensors": self._tensors.next,
            "samples": self._samples.next,
            "events": self._log.cursor,
            "recent": self._recent.tolist(),
        }

    def _restore(self, cursor: dict[str, Any]) -> None:
        """Take up a cursor; what of it cannot be true counts as absent."""
        for tail, key in ((self._steps, "steps"), (self._tensors, "tensors"), (self._samples, "samples")):
            value = cursor.get(key)
            if isinstance(value, int) and 1 <= value < 2**62:
                tail.next = value
        self._log.restore(cursor.get("events"))
        recent = cursor.get("recent")
        if isinstance(recent, list) and 0 < len(recent) <= LATE_ROWS:
            try:
                table = np.array(recent, np.int64).reshape(-1, 2)
            except (ValueError, TypeError, OverflowError):
                return
            ordered = bool((np.diff(table[:, 0]) > 0).all())
            if ordered and table[0, 0] > 0 and table[-1, 0] < self._steps.next and np.ptp(table[:, 0]) < self._late:
                self._recent = table

    def close(self) -> None:
        """Close all files; the reader is done."""
        while self._fds:
            os.close(self._fds.pop())


def _payload_rows(block: Slots, geometry: RingGeometry) -> PayloadRows:
    return PayloadRows(
        column(block, 0, np.uint64),
        column(block, 8, np.uint64),
        column(block, 16, np.int64),
        column(block, 24, np.float64),
        columns(block, geometry.second + 8, geometry.device, np.float32),
    )
