"""Reading one ring in order, while it is written: whole rows only, each once, and a count of what was lost."""

from __future__ import annotations

import os
import zlib
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from gradwatch.journal.errors import JournalError
from gradwatch.journal.ring import HEADER_BYTES, RingGeometry

#: A first look costs this much; only where it is not enough, a whole block is read.
_GLANCE_BYTES: Final = 64 * 2**10
_BLOCK_BYTES: Final = 2**20
#: Blocks looked through in one read: a reader that is laps behind goes on at its next.
_MAX_BLOCKS: Final = 64
#: No sequence number is larger, so that sums of them cannot overflow.
_MAX_SEQUENCE: Final = 2**62

Slots = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]


@dataclass(slots=True)
class RingTail:
    """A ring from ``next`` on, the sequence number that is expected."""

    fd: int
    where: str
    next: int = 1
    #: Whether the last :meth:`read` stopped at its limit and more can be read at once.
    cut: bool = False
    #: Rows passed over because they were overwritten or torn; see :meth:`take_missed`.
    missed: int = 0
    geometry: RingGeometry = field(init=False)
    #: How far was looked beyond a hole at ``next`` for nothing.
    _searched: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.geometry = RingGeometry.unpack(pread(self.fd, HEADER_BYTES, 0), self.where)
        size = os.fstat(self.fd).st_size
        if size < self.geometry.file_size:
            raise JournalError(
                f"{self.where}: truncated ({size} bytes, its header says {self.geometry.file_size}); delete the attempt"
            )

    def read(self, limit: int, *, ended: bool = False) -> Slots:
        """Raw slots of the whole rows from ``next`` on, in order, at most ``limit``; ``advance`` passes them.

        Torn rows are left out where a later one stands. ``ended`` says that no
        more will be written: then a hole that a crash of the machine tore into
        the file is looked beyond, however large.
        """
        capacity, slot = self.geometry.capacity, self.geometry.slot_size
        most = max(1, min(limit, capacity, _BLOCK_BYTES // slot))
        self.cut = False
        at = self.next
        for _ in range(_MAX_BLOCKS):
            block, whole = self._look(at, most, glance=not ended)
            if whole.any():
                found = np.flatnonzero(whole)
                lapped = len(block) == capacity and self._newest(block, at) is not None
                self.cut = bool(found[-1] >= most) or lapped
                return block[found[found < most]] if found[0] < most else block[found[:1]]
            newest = self._newest(block, at)
            if newest is not None:
                # The writer is a lap ahead: what it has overwritten is lost, the oldest that can stand is next.
                self._lose(max(at + 1, newest - capacity + 1))
                at = self.next
                continue
            if ended:
                at = self._searched = max(at + len(block), self._searched)
            if not ended or at - self.next >= capacity or not len(block):
                return np.empty((0, slot), np.uint8)
        self.cut = True
        return np.empty((0, slot), np.uint8)

    def advance(self, rows: Slots) -> None:
        """Move behind rows that :meth:`read` gave; what lies between them is missed."""
        if len(rows):
            last = int(column(rows, 0, np.uint64)[-1])
            self.missed += last + 1 - self.next - len(rows)
            self.next = last + 1

    def take(self, limit: int, *, ended: bool = False) -> Slots:
        """Read and advance: for rings whose rows are written whole."""
        rows = self.read(limit, ended=ended)
        self.advance(rows)
        return rows

    def take_missed(self) -> int:
        """How many rows were missed since this was asked last."""
        missed, self.missed = self.missed, 0
        return missed

    def newest(self, limit: int) -> list[Slots]:
        """The last ``limit`` rows that stand, in blocks, without moving."""
        look = copy(self)
        # As many turns as the ring has blocks, and no more: a writer that is faster must not be chased for ever.
        for _ in range(2 + self.geometry.capacity * self.geometry.slot_size // _BLOCK_BYTES):
            if not len(look.take(self.geometry.capacity, ended=True)) and not look.cut:
                break
        look.next, look.cut = max(1, look.next - min(limit, self.geometry.capacity)), True
        blocks: list[Slots] = []
        while look.cut and limit > 0:
            blocks.append(look.take(limit, ended=True))
            limit -= len(blocks[-1])
        return blocks

    def slots(self, first: int, count: int) -> Slots:
        """Raw slots of ``count`` consecutive sequence numbers, over the ring's edge if need be."""
        geometry = self.geometry
        slot = geometry.slot_size
        count = min(count, geometry.capacity)
        before_edge = min(count, geometry.capacity - first % geometry.capacity)
        data = pread(self.fd, before_edge * slot, geometry.offset(first))
        if len(data) == before_edge * slot and count > before_edge:
            data += pread(self.fd, (count - before_edge) * slot, HEADER_BYTES)
        whole = len(data) // slot
        return np.frombuffer(data, np.uint8, whole * slot).reshape(whole, slot)

    def first_part_fits(self, block: Slots, among: Mask) -> Mask:
        """Which of the rows ``among`` a block's have a whole first part."""
        return self._checked(block, 0, self.geometry.first_crc, among)

    def second_part_fits(self, block: Slots, among: Mask | None = None) -> Mask:
        """For each slot, whether its second part is whole and of the row of its first."""
        begin = self.geometry.second
        same = column(block, begin, np.uint64) == column(block, 0, np.uint64)
        return self._checked(block, begin, self.geometry.second_crc, same if among is None else same & among)

    def _checked(self, block: Slots, begin: int, end: int, among: Mask) -> Mask:
        fits = np.zeros(len(block), np.bool_)
        indices = np.flatnonzero(among)
        if len(indices):
            flat, slot, crc32 = np.ascontiguousarray(block).reshape(-1).data, block.shape[1], zlib.crc32
            found = [crc32(flat[i * slot + begin : i * slot + end]) for i in indices.tolist()]
            fits[indices] = np.array(found, np.uint32) == column(block, end, np.uint32)[indices]
        return fits

    def _look(self, first: int, most: int, glance: bool) -> tuple[Slots, Mask]:
        """The slots from ``first`` on, ``most`` and the one behind them, and which hold the row expected there."""
        count = few = min(most + 1, self.geometry.capacity)
        if glance:
            few = max(2, _GLANCE_BYTES // self.geometry.slot_size)
        block = self.slots(first, min(few, count))
        if few < count and len(block) == few and int(column(block, 0, np.uint64)[-1]) >= first + few - 1:
            block = self.slots(first, count)
        whole = self._whole(block, first)
        if whole.any() and not whole[: int(np.flatnonzero(whole)[-1])].all():
            # A row that was being stored while it was copied is whole by now, since a later one stands.
            again = self.slots(first, len(block))
            if len(again) == len(block):
                now = self._whole(again, first) & ~whole
                block, whole = np.where(now[:, None], again, block), whole | now
        return block, whole

    def _whole(self, block: Slots, first: int) -> Mask:
        expected = np.arange(first, first + len(block), dtype=np.uint64)
        whole = self.first_part_fits(block, column(block, 0, np.uint64) == expected)
        # Where the host has no columns, rows are written in one go: half of one is none.
        return whole if self.geometry.host else self.second_part_fits(block, whole)

    def _newest(self, block: Slots, first: int) -> int | None:
        """The highest sequence number of whole rows of later laps in a block, None where there is none."""
        sequences = column(block, 0, np.uint64)
        expected = np.arange(first, first + len(block), dtype=np.uint64)
        later = (sequences > expected) & (sequences < _MAX_SEQUENCE)
        later &= (sequences - expected) % np.uint64(self.geometry.capacity) == 0
        later = self.first_part_fits(block, later)
        return int(sequences[later].max()) if later.any() else None

    def _lose(self, to: int) -> None:
        self.missed += to - self.next
        self.next = to


def column(block: Slots, offset: int, dtype: Any) -> npt.NDArray[Any]:
    """One column of a block of slots."""
    return columns(block, offset, 1, dtype).reshape(len(block))


def columns(block: Slots, offset: int, count: int, dtype: Any) -> npt.NDArray[Any]:
    """``count`` adjacent columns of a block of slots: an array of (rows, count)."""
    width = np.dtype(dtype).itemsize
    part = np.ascontiguousarray(block[:, offset : offset + count * width])
    found: npt.NDArray[Any] = part.view(dtype).reshape(len(block), count)
    return found


def pread(fd: int, size: int, offset: int) -> bytes:
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
