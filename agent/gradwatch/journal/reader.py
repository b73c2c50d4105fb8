"""Reading a journal while it is written, or long after.

Only ``pread``, nothing mapped, nothing written; every size is proved before it
is used. A row is shown once its checksum fits and it is final; what a slow
reader missed is counted.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradwatch.journal import layout
from gradwatch.journal.errors import JournalError
from gradwatch.journal.liveness import is_locked
from gradwatch.journal.manifest import MAX_BYTES, Manifest, parse
from gradwatch.journal.ring import HEADER_BYTES, RingGeometry

#: How long the newest row may still gain values before it is shown as it is.
SETTLE_SECONDS: Final = 0.5
#: How many shown rows are looked at again for values that arrive late.
LATE_ROWS: Final = 64
_BLOCK_BYTES: Final = 4 * 2**20
_MAX_EVENT_BYTES: Final = 1 * 2**20

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
        reading begins at the oldest row that the rings still hold.
        """
        self.directory = directory
        self._clock = clock
        self._fds: list[int] = []
        try:
            self.manifest: Manifest = parse(
                self._read_whole(layout.MANIFEST, MAX_BYTES + 1), str(directory / layout.MANIFEST)
            )
            self._steps = self._ring(layout.STEPS)
            self._tensors = self._ring(layout.TENSORS)
            self._samples = self._ring(layout.SAMPLES)
            self._check_columns()
        except OSError as error:
            self.close()
            raise JournalError(f"{directory}: {error.strerror or error}") from None
        except JournalError:
            self.close()
            raise
        self.columns = self.manifest.host_columns + self.manifest.device_columns
        self._log = _EventTail(directory)
        self._tail_seen: tuple[int, float] = (0, 0.0)
        self._late: dict[int, int] = {}
        if cursor:
            self._restore(cursor)

    # -- opening

    def _open(self, name: str) -> int:
        # O_NONBLOCK: a FIFO planted here must not hang the reader.
        fd = os.open(self.directory / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        self._fds.append(fd)
        return fd

    def _read_whole(self, name: str, limit: int) -> bytes:
        fd = self._open(name)
        try:
            return _pread(fd, limit, 0)
        finally:
            self._fds.remove(fd)
            os.close(fd)

    def _ring(self, name: str) -> _RingTail:
        return _RingTail(self._open(name), str(self.directory / name))

    def _check_columns(self) -> None:
        steps, manifest = self._steps.geometry, self.manifest
        fits = (
            (steps.host, steps.device, steps.width)
            == (len(manifest.host_columns), len(manifest.device_columns), 8)
            and (self._tensors.geometry.host, self._tensors.geometry.device) == (0, len(manifest.tensors))
            and self._samples.geometry.host == 0
            and all(s.offset + s.size <= self._samples.geometry.device for s in manifest.sections)
            and self._tensors.geometry.width == self._samples.geometry.width == 4
        )
        if not fits:
            raise JournalError(
                f"{self.directory}: the rings' columns are not the manifest's; delete the attempt"
            )

    # -- reading

    def alive(self) -> bool:
        """Whether the writer lives. Must not be asked in the writer's own process."""
        return is_locked(self.directory / layout.LOCK)

    def poll(self, limit: int = 16_384) -> Events:
        """What has come since the last poll, at most ``limit`` rows of each ring.

        The newest row is kept back for half a second while its writer lives,
        since its loss may still come; what comes later yet is in ``amended``.
        """
        alive = self.alive()
        block, missed = self._steps.read(limit)
        kept = self._settled(block, alive)
        self._steps.advance(kept)
        rows = self._step_rows(block[:kept])
        amended = self._amended(set(rows.sequence.tolist()))
        self._remember(block[:kept])
        tensors, _ = self._tensors.take(limit)
        samples, _ = self._samples.take(limit)
        return Events(
            steps=rows,
            amended=amended,
            tensors=_payload_rows(tensors, self._tensors.geometry),
            samples=_payload_rows(samples, self._samples.geometry),
            events=self._log.read(),
            missed=missed,
            more=self._steps.cut or self._tensors.cut or self._samples.cut,
        )

    def last_steps(self, count: int) -> StepRows:
        """The last ``count`` rows that still stand, settled or not, without moving the cursor."""
        tail = self._steps.copy()
        block, _ = tail.read(count)
        while len(block):
            tail.advance(len(block))
            block, _ = tail.read(count)
        tail.next = max(1, tail.next - min(count, tail.geometry.capacity))
        block, _ = tail.read(count)
        return self._step_rows(block)

    def _settled(self, block: npt.NDArray[np.uint8], alive: bool) -> int:
        """How many rows of a block are final: all but the newest, and that one too after a while."""
        if not len(block) or not alive or self._steps.cut:
            return len(block)
        newest = int(_column(block, 0, np.uint64)[-1])
        now = self._clock()
        if self._tail_seen[0] != newest:
            self._tail_seen = (newest, now)
        return len(block) if now - self._tail_seen[1] >= SETTLE_SECONDS else len(block) - 1

    def _step_rows(self, block: npt.NDArray[np.uint8]) -> StepRows:
        geometry = self._steps.geometry
        values = np.full((len(block), geometry.host + geometry.device), np.nan)
        if len(block):
            values[:, : geometry.host] = _columns(block, 32, geometry.host, np.float64)
            whole = self._steps.second_part_fits(block)
            device = _columns(block, geometry.second + 8, geometry.device, np.float64)
            values[whole, geometry.host :] = device[whole]
        return StepRows(
            self.columns,
            _column(block, 0, np.uint64),
            _column(block, 16, np.int64),
            _column(block, 24, np.float64),
            values,
        )

    def _remember(self, block: npt.NDArray[np.uint8]) -> None:
        """Keep in mind the last rows shown, with their second part's checksum, to notice what comes late."""
        if not len(block):
            return
        geometry = self._steps.geometry
        tail = block[-LATE_ROWS:]
        crc_at = geometry.second + 8 + geometry.device * 8
        fits = self._steps.second_part_fits(tail)
        last = len(tail) - 1
        for index, sequence in enumerate(_column(tail, 0, np.uint64).tolist()):
            if index == last or not fits[index]:
                self._late[sequence] = int(_column(tail, crc_at, np.uint32)[index]) if fits[index] else -1
        newest = int(_column(tail, 0, np.uint64)[-1])
        for sequence in [
            s for s in self._late if s <= newest - LATE_ROWS or (s < newest and self._late[s] != -1)
        ]:
            del self._late[sequence]

    def _amended(self, fresh: set[int]) -> StepRows:
        rows = []
        geometry = self._steps.geometry
        for sequence, before in list(self._late.items()):
            block = self._steps.row(sequence)
            if block is None:
                del self._late[sequence]
                continue
            if self._steps.second_part_fits(block)[0]:
                crc = int(_column(block, geometry.second + 8 + geometry.device * 8, np.uint32)[0])
                if crc != before:
                    rows.append(block)
                    self._late[sequence] = crc
        if not rows:
            return self._step_rows(np.empty((0, geometry.slot_size), np.uint8))
        return self._step_rows(np.concatenate(rows))

    # -- the cursor

    @property
    def cursor(self) -> dict[str, Any]:
        """Where the next poll begins, JSON-safe: keep it beside what was made of the rows."""
        return {
            "steps": self._steps.next,
            "tensors": self._tensors.next,
            "samples": self._samples.next,
            "events": self._log.cursor,
        }

    def _restore(self, cursor: dict[str, Any]) -> None:
        for tail, key in ((self._steps, "steps"), (self._tensors, "tensors"), (self._samples, "samples")):
            value = cursor.get(key)
            if isinstance(value, int) and 1 <= value < 2**62:
                tail.next = value
        self._log.restore(cursor.get("events"))

    def close(self) -> None:
        """Close all files; the reader is done."""
        while self._fds:
            os.close(self._fds.pop())


@dataclass(slots=True)
class _RingTail:
    """Reads a ring in order from ``next``, the sequence number that it expects."""

    fd: int
    where: str
    next: int = 1
    cut: bool = False
    geometry: RingGeometry = field(init=False)

    def __post_init__(self) -> None:
        self.geometry = RingGeometry.unpack(_pread(self.fd, HEADER_BYTES, 0), self.where)
        size = os.fstat(self.fd).st_size
        if size < self.geometry.file_size:
            raise JournalError(
                f"{self.where}: truncated ({size} bytes, its header says {self.geometry.file_size}); "
                "delete the attempt"
            )

    def copy(self) -> _RingTail:
        return _RingTail(self.fd, self.where, self.next)

    def take(self, limit: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Read and advance: for rings whose rows are written whole."""
        block, missed = self.read(limit)
        self.advance(len(block))
        return block, missed

    def advance(self, count: int) -> None:
        self.next += count

    def read(self, limit: int) -> tuple[npt.NDArray[np.uint8], int]:
        """Valid consecutive rows from ``next`` on, and how many were lost on the way there.

        Returns an array of raw slots. ``next`` moves over lost rows, not over
        the rows returned; ``cut`` says whether the limit ended the reading.
        """
        missed = 0
        slot = self.geometry.slot_size
        most = max(1, min(limit, self.geometry.capacity, _BLOCK_BYTES // slot))
        # Each turn moves over at least one block, so a whole ring is passed in this many.
        for _ in range(self.geometry.capacity // most + 3):
            block = self._slots(self.next, most)
            good = self._good(block, self.next)
            if good:
                self.cut = good == len(block) and good < self.geometry.capacity
                return block[:good], missed
            oldest = self._oldest_beyond_gap(block)
            if oldest is None:
                break
            missed += oldest - self.next
            self.next = oldest
        self.cut = False
        return np.empty((0, slot), np.uint8), missed

    def row(self, sequence: int) -> npt.NDArray[np.uint8] | None:
        """The slot of one row, None where it stands no more."""
        block = self._slots(sequence, 1)
        return block if self._good(block, sequence) else None

    def second_part_fits(self, block: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
        """For each slot, whether its second part is whole and of this row."""
        begin = self.geometry.second
        end = begin + 8 + self.geometry.device * self.geometry.width
        sequence, row = _column(block, begin, np.uint64), _column(block, 0, np.uint64)
        crc = _column(block, end, np.uint32)
        return np.fromiter(
            (
                sequence[i] == row[i] and zlib.crc32(block[i, begin:end].data) == crc[i]
                for i in range(len(block))
            ),
            np.bool_,
            len(block),
        )

    def _slots(self, first: int, count: int) -> npt.NDArray[np.uint8]:
        """Raw slots of ``count`` consecutive sequence numbers, over the ring's edge if need be."""
        geometry = self.geometry
        position = first % geometry.capacity
        before_edge = min(count, geometry.capacity - position)
        data = _pread(self.fd, before_edge * geometry.slot_size, geometry.offset(first))
        if len(data) == before_edge * geometry.slot_size and count > before_edge:
            data += _pread(self.fd, (count - before_edge) * geometry.slot_size, HEADER_BYTES)
        whole = len(data) // geometry.slot_size
        return np.frombuffer(data, np.uint8, whole * geometry.slot_size).reshape(whole, geometry.slot_size)

    def _good(self, block: npt.NDArray[np.uint8], first: int) -> int:
        """How many rows from the block's beginning are whole and in sequence."""
        sequence = _column(block, 0, np.uint64)
        expected = np.arange(first, first + len(block), dtype=np.uint64)
        wrong = np.flatnonzero(sequence != expected)
        candidates = int(wrong[0]) if len(wrong) else len(block)
        if not candidates:
            return 0
        crc_at = 32 + self.geometry.host * self.geometry.width
        crc = _column(block, crc_at, np.uint32)
        for i in range(candidates):
            if zlib.crc32(block[i, :crc_at].data) != crc[i]:
                return i
        if self.geometry.host == 0:
            whole = self.second_part_fits(block[:candidates])
            torn = np.flatnonzero(~whole)
            return int(torn[0]) if len(torn) else candidates
        return candidates

    def _oldest_beyond_gap(self, block: npt.NDArray[np.uint8]) -> int | None:
        """The oldest row that can still stand beyond a gap at ``next``; None where nothing newer is written.

        ``next`` itself may be torn (a newer row stands behind it), or the
        writer may be laps ahead (its newest row here tells how far).
        """
        sequences = _column(block, 0, np.uint64)
        expected = np.arange(self.next, self.next + len(block), dtype=np.uint64)
        newer = (sequences >= expected) & (sequences < 2**62)
        newer[0] &= sequences[0] > expected[0]
        for index in np.flatnonzero(newer)[np.argsort(sequences[newer])][::-1]:
            sequence = int(sequences[index])
            in_place = (sequence - int(expected[index])) % self.geometry.capacity == 0
            if in_place and self._good(block[index : index + 1], sequence):
                return max(self.next + 1, sequence - self.geometry.capacity + 1)
        return None


class _EventTail:
    """Reads ``events.jsonl`` by whole lines, over its rotation."""

    def __init__(self, directory: Path) -> None:
        self._paths = (directory / f"{layout.EVENTS}.1", directory / layout.EVENTS)
        self._inode = 0
        self._offset = 0

    @property
    def cursor(self) -> list[int]:
        return [self._inode, self._offset]

    def restore(self, cursor: object) -> None:
        if (
            isinstance(cursor, list)
            and len(cursor) == 2
            and all(isinstance(v, int) and v >= 0 for v in cursor)
        ):
            self._inode, self._offset = cursor

    def read(self) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        old, current = (self._identity(path) for path in self._paths)
        if not self._inode or self._inode not in (old, current):
            # First look, or two rotations since the last: begin with the oldest that is there.
            self._inode, self._offset = (old or current), 0
        if self._inode and self._inode == old:
            events.extend(self._lines(self._paths[0]))
            self._inode, self._offset = current, 0
        if self._inode:
            events.extend(self._lines(self._paths[1]))
        return events

    def _identity(self, path: Path) -> int:
        try:
            return path.lstat().st_ino
        except OSError:
            return 0

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return
        try:
            while True:
                data = _pread(fd, _MAX_EVENT_BYTES, self._offset)
                end = data.rfind(b"\n") + 1
                if not end:
                    if len(data) < _MAX_EVENT_BYTES:
                        return  # a line still being written
                    end = len(data)  # no event is that long: pass over it
                self._offset += end
                for line in data[:end].splitlines():
                    event = _event(line)
                    if event is not None:
                        yield event
        except OSError:
            return
        finally:
            os.close(fd)


def _event(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("kind"), str) else None


def _payload_rows(block: npt.NDArray[np.uint8], geometry: RingGeometry) -> PayloadRows:
    return PayloadRows(
        _column(block, 0, np.uint64),
        _column(block, 8, np.uint64),
        _column(block, 16, np.int64),
        _column(block, 24, np.float64),
        _columns(block, geometry.second + 8, geometry.device, np.float32),
    )


def _column(block: npt.NDArray[np.uint8], offset: int, dtype: Any) -> npt.NDArray[Any]:
    return _columns(block, offset, 1, dtype).reshape(len(block))


def _columns(block: npt.NDArray[np.uint8], offset: int, count: int, dtype: Any) -> npt.NDArray[Any]:
    width = np.dtype(dtype).itemsize
    part = np.ascontiguousarray(block[:, offset : offset + count * width])
    columns: npt.NDArray[Any] = part.view(dtype).reshape(len(block), count)
    return columns


def _pread(fd: int, size: int, offset: int) -> bytes:
    """``pread`` that does not stop short before the end of the file."""
    parts = []
    while size > 0:
        part = os.pread(fd, size, offset)
        if not part:
            break
        parts.append(part)
        size -= len(part)
        offset += len(part)
    return b"".join(parts)
