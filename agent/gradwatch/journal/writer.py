"""The trainer's side of the journal: append rows and events, never wait, never kill.

Every method is safe to call on the training thread: a row costs two ``struct``
packs, two crc32 and a store into a mapped page. Errors of the file system come as
``OSError``; the probe turns them into one warning and steps aside.
"""

from __future__ import annotations

import errno
import os
import struct
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from gradwatch.journal import layout, mapping
from gradwatch.journal.events import EventLog
from gradwatch.journal.liveness import Lock, is_locked
from gradwatch.journal.manifest import MAX_BYTES, Manifest
from gradwatch.journal.ring import HEAD, HEADER_BYTES, RingGeometry, rows_that_fit

#: Bytes of an attempt on disk, shared out over its files.
DEFAULT_CAPACITY: Final = 32 * 2**20
#: No history of steps is longer than this: it is 27 minutes at 40 steps a second.
MAX_ROWS: Final = 65_536
#: Samples are rare: this many reach back further than any history of steps.
MAX_SAMPLES: Final = 1_024
#: Rows below which a history is none.
LEAST_ROWS: Final = 8
LEAST_SAMPLES: Final = 4
_SEQUENCE: Final = struct.Struct("<Q")
_crc32: Final = zlib.crc32


class StepRing:
    """``steps.ring``: float64 rows in two parts, the second of which may be written later or again."""

    def __init__(self, name: str, geometry: RingGeometry, mode: int, dir_fd: int) -> None:
        self._file = mapping.create(name, geometry.file_size, mode, dir_fd, geometry.pack())
        self.geometry = geometry
        #: Sequence number of the last row, 0 before the first.
        self.sequence = 0
        first, second = struct.Struct(f"<QQqd{geometry.host}d"), struct.Struct(f"<Q{geometry.device}d")
        self._pack_first, self._pack_second = first.pack, second.pack
        self._first_layout, self._second_layout = first, second
        # Where the row stands is worked out at each step: looking a property up there would cost more than the crc.
        self._capacity, self._slot_size, self._second = geometry.capacity, geometry.slot_size, geometry.second
        self._put = self._file.putter(struct.Struct(f"<{first.size}sI4x{second.size}sI4x"))
        self._put_second = self._file.putter(struct.Struct(f"<{second.size}sI4x"))
        self._absent = bytes(second.size)

    def append(self, step: int, time: float, host: Sequence[float], device: Sequence[float] | None) -> int:
        """Write the next row, return its sequence number. ``device`` None leaves the second part for later."""
        sequence = self.sequence + 1
        first = self._pack_first(sequence, sequence, step, time, *host)
        second = self._absent if device is None else self._pack_second(sequence, *device)
        self._put(
            HEADER_BYTES + sequence % self._capacity * self._slot_size, first, _crc32(first), second, _crc32(second)
        )
        # Counted when it stands: a row that a full disk refused leaves no hole.
        self.sequence = sequence
        return sequence

    def complete(self, sequence: int, device: Sequence[float]) -> None:
        """Write or rewrite the second part of a row that still stands; of one overwritten since, nothing."""
        if self.sequence - self._capacity < sequence <= self.sequence:
            second = self._pack_second(sequence, *device)
            at = HEADER_BYTES + sequence % self._capacity * self._slot_size + self._second
            self._put_second(at, second, _crc32(second))

    def read_back(self, sequence: int) -> tuple[int, tuple[float, ...], tuple[float, ...]] | None:
        """(step, host columns, device columns) of a row that still stands whole; None of any other."""
        if not max(0, self.sequence - self._capacity) < sequence <= self.sequence:
            return None
        slot = self._file.get(self.geometry.offset(sequence), self._slot_size)
        first = self._first_layout.unpack_from(slot)
        second = self._second_layout.unpack_from(slot, self._second)
        return (first[2], first[4:], second[1:]) if first[0] == second[0] == sequence else None

    def disown(self) -> None:
        """In a forked child: store nothing any more, the file is the parent's."""
        self._put = self._put_second = _nowhere

    def close(self) -> None:
        self.disown()
        self._file.close()


class PayloadRing:
    """``tensors.ring`` and ``samples.ring``: one float32 vector a row, written whole."""

    def __init__(self, name: str, geometry: RingGeometry, mode: int, dir_fd: int) -> None:
        self._file = mapping.create(name, geometry.file_size, mode, dir_fd, geometry.pack())
        self.geometry = geometry
        self.sequence = 0
        self._capacity, self._slot_size = geometry.capacity, geometry.slot_size
        self._second = bytearray(geometry.second_crc - geometry.second)
        self._pack_values = struct.Struct(f"<{geometry.device}f").pack_into
        self._put = self._file.putter(struct.Struct(f"<{HEAD.size}sI4x{len(self._second)}sI4x"))
        #: Fill this, then :meth:`append`; it keeps its values from row to row.
        self.payload: npt.NDArray[np.float32] = np.frombuffer(self._second, np.float32, geometry.device, 8)
        self.payload[:] = np.nan

    def append_values(self, row: int, step: int, time: float, values: Sequence[float]) -> int:
        """Write numbers as the next row: for few of them cheaper than to fill ``payload``."""
        self._pack_values(self._second, 8, *values)
        return self.append(row, step, time)

    def append(self, row: int, step: int, time: float) -> int:
        """Write ``payload`` as the next row, belonging to row ``row`` of ``steps.ring``."""
        sequence = self.sequence + 1
        first, second = _pack_head(sequence, row, step, time), self._second
        _pack_sequence(second, 0, sequence)
        self._put(
            HEADER_BYTES + sequence % self._capacity * self._slot_size, first, _crc32(first), second, _crc32(second)
        )
        self.sequence = sequence
        return sequence

    def read_back(self, sequence: int) -> tuple[int, npt.NDArray[np.float32]] | None:
        """(row of ``steps.ring``, values) of a row that still stands; None of any other."""
        if not max(0, self.sequence - self._capacity) < sequence <= self.sequence:
            return None
        slot = self._file.get(self.geometry.offset(sequence), self._slot_size)
        found, row, _, _ = HEAD.unpack_from(slot)
        values = np.frombuffer(slot, np.float32, self.geometry.device, self.geometry.second + 8)
        return (row, values) if found == sequence else None

    def disown(self) -> None:
        """In a forked child: store nothing any more, the file is the parent's."""
        self._put = _nowhere

    def close(self) -> None:
        self.disown()
        self._file.close()


_pack_head: Final = HEAD.pack
_pack_sequence: Final = _SEQUENCE.pack_into


def _nowhere(*_: Any) -> None:
    """Where a forked child's rows go, and those that come after the close."""


_Ring = TypeVar("_Ring", StepRing, PayloadRing)

#: Writers of this process, which a forked child disowns.
_open: weakref.WeakSet[JournalWriter] = weakref.WeakSet()


class JournalWriter:
    """Creates an attempt's directory, takes its lock, and writes into it."""

    def __init__(self, directory: Path, manifest: Manifest, capacity: int = DEFAULT_CAPACITY) -> None:
        """Create all files, allocated in full.

        ``capacity`` bounds the bytes of the directory: models with many tensors
        have shorter histories, never larger files (see :func:`share_out`, which
        also says in a ``ValueError`` what to leave out where even eight rows
        do not fit). Raises ``OSError`` where the directory cannot hold that;
        nothing of a failed attempt stays but an empty directory. An attempt
        belongs to one writer: where there was one already ``FileExistsError``
        is raised, ``BlockingIOError`` while it lives.
        """
        document = manifest.to_json()
        geometries = share_out(manifest, capacity, len(document))
        self.directory, self.manifest = directory, manifest
        self._created: list[str] = []
        self._parts: list[StepRing | PayloadRing | EventLog] = []
        self._lock: Lock | None = None
        self._pid = os.getpid()
        self._dir_fd, shared = layout.create_attempt(directory)
        mode = 0o640 if shared else 0o600
        try:
            self._lock = self._take_lock(mode)
            self.steps = self._keep(StepRing, layout.STEPS, geometries[layout.STEPS], mode)
            self.tensors = self._keep(PayloadRing, layout.TENSORS, geometries[layout.TENSORS], mode)
            self.samples = self._keep(PayloadRing, layout.SAMPLES, geometries[layout.SAMPLES], mode)
            self.events = EventLog(self._dir_fd, capacity // 8, mode)
            self._parts.append(self.events)
            self._created.append(layout.EVENTS)
            # The manifest comes last: a directory with a manifest is whole.
            _write_whole(layout.MANIFEST, document, mode, self._dir_fd)
        except BaseException as error:
            self._remove()
            if isinstance(error, OSError) and isinstance(error.filename, str):
                error.filename = str(directory / error.filename)
            raise
        _open.add(self)

    def _take_lock(self, mode: int) -> Lock:
        try:
            lock = Lock(Path(layout.LOCK), mode, fresh=True, dir_fd=self._dir_fd)
        except FileExistsError:
            if is_locked(self.directory / layout.LOCK):
                raise BlockingIOError(f"{self.directory}: another process writes this attempt") from None
            raise FileExistsError(
                errno.EEXIST, "an earlier writer left this attempt; take the next one", layout.LOCK
            ) from None
        self._created.append(layout.LOCK)
        lock.fchmod(mode)
        return lock

    def _keep(self, kind: type[_Ring], name: str, geometry: RingGeometry, mode: int) -> _Ring:
        ring = kind(name, geometry, mode, self._dir_fd)
        self._parts.append(ring)
        self._created.append(name)
        return ring

    def _remove(self) -> None:
        """Take back what was created, and that only; the lock's file while the lock is held."""
        for name in reversed(self._created):
            try:
                os.unlink(name, dir_fd=self._dir_fd)
            except OSError:
                continue
        self.close()

    def disown(self) -> None:
        """In a forked child: the journal is the parent's, whatever is called here from now on."""
        for part in self._parts:
            part.disown()

    def close(self) -> None:
        """Release everything; the lock last, since a free lock says that no more will be written.

        May be called again, and does nothing in a forked child.
        """
        if os.getpid() != self._pid:
            return
        while self._parts:
            self._parts.pop().close()
        if self._lock is not None:
            self._lock.release()
        if self._dir_fd >= 0:
            os.close(self._dir_fd)
            self._dir_fd = -1


def _disown_all() -> None:
    for writer in list(_open):
        writer.disown()


os.register_at_fork(after_in_child=_disown_all)


def share_out(manifest: Manifest, capacity: int, manifest_bytes: int = 0) -> dict[str, RingGeometry]:
    """How many rows each ring gets so that the attempt stays within ``capacity`` bytes.

    The events get an eighth, the samples up to a quarter. Steps and the norms
    of their tensors share the rest, row by row, so that both reach back
    equally far; where rows of tensors are large the steps, which are small,
    keep a sixteenth for themselves and reach further.

    Raises ``ValueError`` where not even eight rows of steps and tensors and
    four samples fit, and says what to leave out.
    """
    sample_width = max((s.offset + s.size for s in manifest.sections), default=0)
    step_width = len(manifest.host_columns), len(manifest.device_columns)
    room = capacity - capacity // 8 - manifest_bytes - 2 * HEADER_BYTES
    samples = _at_most(MAX_SAMPLES, rows_that_fit(capacity // 4, 0, sample_width, 4, LEAST_SAMPLES))
    room -= samples.file_size
    step, tensor = RingGeometry(*step_width, 8, 1).slot_size, RingGeometry(0, len(manifest.tensors), 4, 1).slot_size
    both = max(LEAST_ROWS, min(MAX_ROWS, room // (step + tensor)))
    steps = _at_most(MAX_ROWS, rows_that_fit(min(room // 2, capacity // 16), *step_width, 8, both))
    tensors = _at_most(
        MAX_ROWS,
        rows_that_fit(HEADER_BYTES + room - steps.capacity * step, 0, len(manifest.tensors), 4, LEAST_ROWS),
    )
    rings = {layout.STEPS: steps, layout.TENSORS: tensors, layout.SAMPLES: samples}
    total = sum(ring.file_size for ring in rings.values()) + capacity // 8 + manifest_bytes
    if total > capacity or manifest_bytes > MAX_BYTES:
        raise ValueError(
            f"a journal of {capacity / 2**20:.3g} MiB cannot hold {LEAST_ROWS} rows of {len(manifest.tensors)} tensors"
            f", {LEAST_SAMPLES} samples of {sample_width} values and a manifest of {manifest_bytes / 2**20:.3g} MiB "
            f"({total / 2**20:.3g} MiB); leave the weight histograms out, record fewer tensors, "
            "or raise GRADWATCH_JOURNAL_MB"
        )
    return rings


def _at_most(rows: int, ring: RingGeometry) -> RingGeometry:
    return RingGeometry(ring.host, ring.device, ring.width, min(ring.capacity, rows))


def _write_whole(name: str, data: bytes, mode: int, dir_fd: int) -> None:
    """Write a file so that a reader sees all of it or none."""
    temporary = f".{name}.{os.getpid()}"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(temporary, flags, mode, dir_fd=dir_fd)
    try:
        os.fchmod(fd, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.rename(temporary, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:
        os.unlink(temporary, dir_fd=dir_fd)
        raise
    finally:
        os.close(fd)
