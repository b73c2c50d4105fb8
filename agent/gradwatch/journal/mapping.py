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
from collections.abc import Callable
from functools import partial
from struct import Struct
from typing import Any, Final, Protocol

#: Magic numbers of statfs(2) for file systems on which allocated space stays allocated.
SAFE_TO_MAP: Final = frozenset(
    {
        0xEF53,  # ext2, ext3, ext4
        0x01021994,  # tmpfs
        0x58465342,  # xfs
    }
)
_CANNOT_ALLOCATE: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

#: ``put(offset, *values)`` packs values by a fixed layout and stores them at an offset of the file.
Put = Callable[..., None]


class FixedFile(Protocol):
    """What a ring writes through."""

    def putter(self, layout: Struct) -> Put:
        """A function that stores values packed by ``layout``; it raises ``OSError`` or it stored all of them."""
        ...

    def get(self, offset: int, size: int) -> bytes:
        """What stands at an offset. Raises ``OSError``."""
        ...

    def close(self) -> None: ...


class MappedFile:
    """Stores go to a shared mapping: no system call, and they survive the process."""

    def __init__(self, fd: int, size: int) -> None:
        self._map = mmap.mmap(fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)

    def putter(self, layout: Struct) -> Put:
        # pack_into(buffer, offset, *values) straight into the page: no copy, no slice, no view.
        return partial(layout.pack_into, self._map)

    def get(self, offset: int, size: int) -> bytes:
        return self._map[offset : offset + size]

    def close(self) -> None:
        self._map.close()


class WrittenFile:
    """Stores go by ``pwrite``: slower, for file systems where a mapping could kill."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def putter(self, layout: Struct) -> Put:
        fd, pack, size = self._fd, layout.pack, layout.size

        def put(offset: int, *values: Any) -> None:
            if os.pwrite(fd, pack(*values), offset) != size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        return put

    def get(self, offset: int, size: int) -> bytes:
        return os.pread(self._fd, size, offset)

    def close(self) -> None:
        os.close(self._fd)


def create(name: str, size: int, mode: int, dir_fd: int, header: bytes) -> FixedFile:
    """Create a file of ``size`` allocated bytes that begins with ``header``.

    Raises ``OSError`` (ENOSPC, EROFS, EEXIST, ...) and leaves nothing of its own then.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(name, flags, mode, dir_fd=dir_fd)
    try:
        os.fchmod(fd, mode)
        mappable = file_system_type(fd) in SAFE_TO_MAP
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _CANNOT_ALLOCATE:
                raise
            mappable = False
            os.ftruncate(fd, size)
        if os.pwrite(fd, header, 0) != len(header):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return MappedFile(fd, size) if mappable else WrittenFile(fd)
    except BaseException as error:
        os.close(fd)
        os.unlink(name, dir_fd=dir_fd)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = name
        raise


def file_system_type(fd: int) -> int:
    """The file system's magic number from fstatfs(2), 0 where it cannot be asked."""
    try:
        buffer = ctypes.create_string_buffer(256)
        if ctypes.CDLL(None, use_errno=True).fstatfs(ctypes.c_int(fd), buffer) != 0:
            return 0
        # f_type is the first word: a long on every Linux that PyTorch runs on.
        return int(ctypes.c_long.from_buffer(buffer).value) & 0xFFFFFFFF
    except (AttributeError, OSError):
        return 0
