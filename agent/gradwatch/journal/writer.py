"""The trainer's side of the journal: append rows and events, never wait, never kill.

Every method is safe to call on the training thread: a row costs a ``struct``
pack, a crc32 and a store into a mapped page. Errors of the file system come as
``OSError``; the probe turns them into one warning and steps aside.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradwatch.journal import layout, mapping
from gradwatch.journal.liveness import Lock
from gradwatch.journal.manifest import Manifest
from gradwatch.journal.ring import HEAD, RingGeometry, rows_that_fit

#: Bytes of an attempt on disk, shared out over its files.
DEFAULT_CAPACITY: Final = 32 * 2**20
#: No history of steps is longer than this: it is 27 minutes at 40 steps a second.
MAX_ROWS: Final = 65_536
_CRC = struct.Struct("<II")
_SEQUENCE = struct.Struct("<Q")


class StepRing:
    """``steps.ring``: float64 rows in two parts, the second of which may be written later or again."""

    def __init__(self, path: Path, geometry: RingGeometry, mode: int) -> None:
        self._file = mapping.create(path, geometry.file_size, mode)
        self._file.store(0, geometry.pack())
        self.geometry = geometry
        self.sequence = 0
        self._first = struct.Struct(f"<QQqd{geometry.host}d")
        self._second = struct.Struct(f"<Q{geometry.device}d")
        self._scratch = bytearray(geometry.slot_size)
        view = memoryview(self._scratch)
        self._first_view = view[: self._first.size]
        self._second_view = view[geometry.second : geometry.second + self._second.size]
        self._second_slot = view[geometry.second :]
        self._no_second = bytes(8)

    def append(self, step: int, time: float, host: Sequence[float], device: Sequence[float] | None) -> int:
        """Write the next row, return its sequence number. ``device`` None leaves the second part for later."""
        self.sequence = sequence = self.sequence + 1
        geometry, scratch = self.geometry, self._scratch
        self._first.pack_into(scratch, 0, sequence, sequence, step, time, *host)
        _CRC.pack_into(scratch, self._first.size, zlib.crc32(self._first_view), 0)
        if device is None:
            scratch[geometry.second : geometry.second + 8] = self._no_second
        else:
            self._second.pack_into(scratch, geometry.second, sequence, *device)
            _CRC.pack_into(scratch, geometry.second + self._second.size, zlib.crc32(self._second_view), 0)
        self._file.store(geometry.offset(sequence), scratch)
        return sequence

    def complete(self, sequence: int, device: Sequence[float]) -> None:
        """Write or rewrite the second part of a row that still stands; of one overwritten since, nothing."""
        if not self.sequence - self.geometry.capacity < sequence <= self.sequence:
            return
        geometry, scratch = self.geometry, self._scratch
        self._second.pack_into(scratch, geometry.second, sequence, *device)
        _CRC.pack_into(scratch, geometry.second + self._second.size, zlib.crc32(self._second_view), 0)
        self._file.store(geometry.offset(sequence) + geometry.second, self._second_slot)

    def close(self) -> None:
        self._first_view.release()
        self._second_view.release()
        self._second_slot.release()
        self._file.close()


class PayloadRing:
    """``tensors.ring`` and ``samples.ring``: one float32 vector a row, written whole."""

    def __init__(self, path: Path, geometry: RingGeometry, mode: int) -> None:
        self._file = mapping.create(path, geometry.file_size, mode)
        self._file.store(0, geometry.pack())
        self.geometry = geometry
        self.sequence = 0
        self._scratch = bytearray(geometry.slot_size)
        view = memoryview(self._scratch)
        begin, end = geometry.second + 8, geometry.second + 8 + geometry.device * 4
        self._checked = view[geometry.second : end]
        self._crc_at = end
        self._head = view[: HEAD.size]
        #: Fill this, then :meth:`append`; it keeps its values from row to row.
        self.payload: npt.NDArray[np.float32] = np.frombuffer(
            self._scratch, np.float32, geometry.device, begin
        )
        self.payload[:] = np.nan

    def append(self, row: int, step: int, time: float) -> int:
        """Write ``payload`` as the next row, belonging to row ``row`` of ``steps.ring``."""
        self.sequence = sequence = self.sequence + 1
        scratch = self._scratch
        HEAD.pack_into(scratch, 0, sequence, row, step, time)
        _CRC.pack_into(scratch, HEAD.size, zlib.crc32(self._head), 0)
        _SEQUENCE.pack_into(scratch, self.geometry.second, sequence)
        _CRC.pack_into(scratch, self._crc_at, zlib.crc32(self._checked), 0)
        self._file.store(self.geometry.offset(sequence), scratch)
        return sequence

    def close(self) -> None:
        del self.payload
        self._checked.release()
        self._head.release()
        self._file.close()


class EventLog:
    """``events.jsonl``: one line an event, in two bounded generations."""

    def __init__(self, path: Path, limit: int, mode: int) -> None:
        self._path, self._limit, self._mode = path, limit, mode
        self._fd = self._open()
        self._size = 0

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(self._path, flags, self._mode)
        os.fchmod(fd, self._mode)
        return fd

    def write(self, event: dict[str, Any]) -> None:
        """Append one event; NaN and infinity are allowed and written as JavaScript writes them."""
        line = json.dumps(event, ensure_ascii=True, separators=(",", ":"), default=str).encode() + b"\n"
        if self._size + len(line) > self._limit // 2:
            os.close(self._fd)
            self._path.replace(self._path.with_name(self._path.name + ".1"))
            self._fd = self._open()
            self._size = 0
        # A line that a full disk cut short is ended, so that the next event stands on a line of its own.
        written = os.write(self._fd, line)
        self._size += written
        if written < len(line):
            os.write(self._fd, b"\n")
            raise OSError(28, "No space left on device", str(self._path))

    def close(self) -> None:
        os.close(self._fd)


class JournalWriter:
    """Creates an attempt's directory, takes its lock, and writes into it."""

    def __init__(self, directory: Path, manifest: Manifest, capacity: int = DEFAULT_CAPACITY) -> None:
        """Create all files, allocated in full.

        ``capacity`` bounds the bytes of the directory (plus the manifest): half
        of it for the norms of tensors, and of the rest what steps, samples and
        events need; models with many tensors have shorter histories, never
        larger files. Raises ``OSError`` where the directory cannot hold that,
        ``BlockingIOError`` where another process writes there; nothing of a
        failed attempt stays but an empty directory.
        """
        shared = layout.make_private_directory(directory)
        mode = 0o640 if shared else 0o600
        self.directory, self.manifest = directory, manifest
        self._lock = Lock(directory / layout.LOCK, mode)
        if shared:
            (directory / layout.LOCK).chmod(mode)
        self._closers: list[Any] = []
        try:
            geometries = share_out(manifest, capacity)
            self.steps = StepRing(directory / layout.STEPS, geometries[layout.STEPS], mode)
            self._closers.append(self.steps)
            self.tensors = PayloadRing(directory / layout.TENSORS, geometries[layout.TENSORS], mode)
            self._closers.append(self.tensors)
            self.samples = PayloadRing(directory / layout.SAMPLES, geometries[layout.SAMPLES], mode)
            self._closers.append(self.samples)
            self.events = EventLog(directory / layout.EVENTS, capacity // 8, mode)
            self._closers.append(self.events)
            # The manifest comes last: a directory with a manifest is whole.
            _write_whole(directory / layout.MANIFEST, manifest.to_json(), mode)
        except BaseException:
            self._remove()
            raise

    def _remove(self) -> None:
        self.close()
        for name in (
            layout.STEPS,
            layout.TENSORS,
            layout.SAMPLES,
            layout.EVENTS,
            layout.MANIFEST,
            layout.LOCK,
        ):
            try:
                (self.directory / name).unlink(missing_ok=True)
            except OSError:
                continue

    def close(self) -> None:
        """Release everything; the lock last, since a free lock says that no more will be written."""
        for part in self._closers:
            part.close()
        self._closers.clear()
        self._lock.release()


def share_out(manifest: Manifest, capacity: int) -> dict[str, RingGeometry]:
    """How many rows each ring gets so that the attempt stays within ``capacity`` bytes.

    Raises ``ValueError`` where the model is too large for even eight rows of it.
    """
    sample_width = max((s.offset + s.size for s in manifest.sections), default=0)
    steps = rows_that_fit(capacity // 8, len(manifest.host_columns), len(manifest.device_columns), 8)
    tensors = rows_that_fit(capacity // 2, 0, len(manifest.tensors), 4)
    samples = rows_that_fit(capacity // 4, 0, sample_width, 4)
    rings = {layout.STEPS: steps, layout.TENSORS: tensors, layout.SAMPLES: samples}
    rings = {
        name: RingGeometry(ring.host, ring.device, ring.width, min(ring.capacity, MAX_ROWS))
        for name, ring in rings.items()
    }
    total = sum(ring.file_size for ring in rings.values()) + capacity // 8
    if total > capacity:
        raise ValueError(
            f"a journal of {capacity >> 20} MiB cannot hold eight rows of {len(manifest.tensors)} tensors "
            f"({total >> 20} MiB needed); record fewer tensors or raise GRADWATCH_JOURNAL_MB"
        )
    return rings


def _write_whole(path: Path, data: bytes, mode: int) -> None:
    """Write a file so that a reader sees all of it or none."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(fd, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)
    temporary.replace(path)
