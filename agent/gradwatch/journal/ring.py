"""The geometry of a ring file: header, slots, parts. Shared by writer and reader.

See ``docs/journal.md`` for the layout in words.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from gradwatch.journal.errors import JournalError

MAGIC: Final = b"GWRING\x00\x01"
HEADER_BYTES: Final = 4096
_HEADER = struct.Struct("<8sIIIIQ")
_CRC = struct.Struct("<I")
#: The first part's head: sequence, row, step, time.
HEAD = struct.Struct("<QQqd")
#: Columns of one row: 65,536 tensors with norms and 28 histogram buckets each fit.
MAX_COLUMNS: Final = 2 * 2**20
#: No ring is larger, whatever its header says: it bounds what a reader can be made to look through.
MAX_FILE_BYTES: Final = 2**30


@dataclass(frozen=True, slots=True)
class RingGeometry:
    """How many slots of which columns a ring has.

    ``host`` and ``device`` count the columns of the two parts, ``width`` is
    the bytes of a column (8 for float64, 4 for float32).
    """

    host: int
    device: int
    width: int
    capacity: int

    @property
    def second(self) -> int:
        """Offset of the second part in a slot."""
        return HEAD.size + _pad(self.host * self.width) + 8

    @property
    def slot_size(self) -> int:
        return self.second + 8 + _pad(self.device * self.width) + 8

    @property
    def second_crc(self) -> int:
        """Offset of the second part's checksum in a slot."""
        return self.slot_size - 8

    @property
    def first_crc(self) -> int:
        """Offset of the first part's checksum in a slot."""
        return self.second - 8

    @property
    def file_size(self) -> int:
        return HEADER_BYTES + self.capacity * self.slot_size

    def offset(self, sequence: int) -> int:
        """Where the slot of a row begins in the file."""
        return HEADER_BYTES + (sequence % self.capacity) * self.slot_size

    def pack(self) -> bytes:
        head = _HEADER.pack(MAGIC, self.slot_size, self.host, self.device, self.width, self.capacity)
        return head + _CRC.pack(zlib.crc32(head))

    @classmethod
    def unpack(cls, data: bytes, where: str) -> RingGeometry:
        """Read a header. Raises ``JournalError`` for one that is truncated, damaged or of another version."""
        if len(data) < _HEADER.size + _CRC.size:
            raise JournalError(f"{where}: truncated before its header; delete the file or the attempt")
        magic, slot_size, host, device, width, capacity = _HEADER.unpack_from(data)
        if magic[:6] != MAGIC[:6]:
            raise JournalError(f"{where}: not a ring file of gradwatch")
        if magic != MAGIC:
            raise JournalError(
                f"{where}: format version {magic[7]}, this gradwatch reads version {MAGIC[7]}; "
                "use an agent of the trainer's version"
            )
        if _CRC.unpack_from(data, _HEADER.size)[0] != zlib.crc32(data[: _HEADER.size]):
            raise JournalError(f"{where}: damaged header (checksum does not fit); delete the attempt")
        geometry = cls(host, device, width, capacity)
        if width not in (4, 8) or capacity < 1 or host + device > MAX_COLUMNS:
            raise JournalError(f"{where}: impossible geometry {geometry}; delete the attempt")
        if geometry.file_size > MAX_FILE_BYTES:
            raise JournalError(f"{where}: larger than {MAX_FILE_BYTES >> 30} GiB by its header; delete the attempt")
        if slot_size != geometry.slot_size:
            raise JournalError(f"{where}: slot size {slot_size} does not fit its columns; delete the attempt")
        return geometry


def _pad(size: int) -> int:
    return (size + 7) // 8 * 8


def rows_that_fit(budget: int, host: int, device: int, width: int, at_least: int = 8) -> RingGeometry:
    """The ring with as many rows as ``budget`` bytes hold, and no fewer than ``at_least``."""
    one = RingGeometry(host, device, width, 1)
    return RingGeometry(host, device, width, max(at_least, (budget - HEADER_BYTES) // one.slot_size))
