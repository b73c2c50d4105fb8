"""A file of fixed size that the trainer can store into without ever being killed for it.

A store into a mapped page of a sparse file on a full disk raises SIGBUS and
kills the process. So space is allocated first (``posix_fallocate``), and only
file systems known to keep that promise are mapped; all others (NFS, FUSE,
overlay on something unknown, ...) get every row by ``pwrite``, which fails with
an errno instead.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from pathlib import Path
from typing import Protocol

#: Magic numbers of statfs(2) for file systems on which allocated space stays allocated.
_SAFE_TO_MAP = {
    0xEF53,  # ext2, ext3, ext4
    0x01021994,  # tmpfs
    0x58465342,  # xfs
}


class FileMap(Protocol):
    """What a ring writes through: ``store`` puts bytes at an offset."""

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None: ...
    def close(self) -> None: ...


class MappedFile:
    """Stores go to a shared mapping: no system call, and they survive the process."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)
        self.view = memoryview(self._map)

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.view[offset : offset + len(data)] = data

    def close(self) -> None:
        self.view.release()
        self._map.close()


class WrittenFile:
    """Stores go by ``pwrite``: slower, for file systems where a mapping could kill."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def store(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        os.pwrite(self._fd, data, offset)

    def close(self) -> None:
        os.close(self._fd)


def create(path: Path, size: int, mode: int) -> FileMap:
    """Create ``path`` with ``size`` allocated bytes. Raises ``OSError`` (ENOSPC, EROFS, ...) and leaves nothing."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
    try:
        os.fchmod(fd, mode)
        mappable = file_system_type(fd) in _SAFE_TO_MAP
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            mappable = False
            os.ftruncate(fd, size)
        return MappedFile(fd, size) if mappable else WrittenFile(fd)
    except BaseException:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise


def file_system_type(fd: int) -> int:
    """The file system's magic number from fstatfs(2), 0 where it cannot be asked."""
    try:
        buffer = ctypes.create_string_buffer(256)
        if ctypes.CDLL(None, use_errno=True).fstatfs(fd, buffer) != 0:
            return 0
        # f_type is the first word: a long on every Linux that PyTorch runs on.
        return int(ctypes.c_long.from_buffer(buffer).value) & 0xFFFFFFFF
    except (AttributeError, OSError):
        return 0
