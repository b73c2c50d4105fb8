"""Whether a writer lives: a POSIX record lock, held for life and asked for without taking it.

A record lock is free however its process died, also while the dead process is
a zombie or a worker that it forked lives on (``flock`` is inherited and stays
held then). ``F_GETLK`` on a read-only descriptor asks for it without taking
it and sees it across PID namespaces. Its one trap: closing *any* descriptor of
the file drops the lock of the process that closes. So the holder opens the
file once, and within its process every question is answered from memory.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from pathlib import Path

# struct flock on 64-bit Linux (x86_64 and aarch64 alike, glibc and musl):
# short l_type, short l_whence, 4 bytes padding, off_t l_start, off_t l_len, pid_t l_pid, 4 bytes padding.
_FLOCK = struct.Struct("@hhqqi4x")

#: (device, inode) of every lock that this process holds -> the process that took it (a fork copies the mapping).
_held: dict[tuple[int, int], int] = {}


class Lock:
    """An exclusive record lock on a file, held until :meth:`release` or the end of the process."""

    def __init__(self, path: Path, mode: int = 0o600, *, fresh: bool = False, dir_fd: int | None = None) -> None:
        """Create the file where it is missing, and take the lock.

        ``fresh`` asks for a new file: ``FileExistsError`` where there is one.
        With ``dir_fd``, ``path`` is relative to that directory. Raises
        ``BlockingIOError`` where somebody holds it, this process included.
        """
        self.path = path
        self._fd: int | None = None
        self._pid = os.getpid()
        if holds(path, dir_fd):
            raise BlockingIOError(f"{path} is held by this process")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if fresh else 0)
        fd = os.open(path, flags, mode, dir_fd=dir_fd)
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except OSError as error:
            os.close(fd)
            if isinstance(error, BlockingIOError | PermissionError):
                raise BlockingIOError(f"{path} is held by another process") from None
            raise
        self._fd = fd
        self._key = _identity(os.fstat(fd))
        _held[self._key] = self._pid

    def fchmod(self, mode: int) -> None:
        """Set the file's permissions without opening it a second time."""
        if self._fd is not None:
            os.fchmod(self._fd, mode)

    def release(self) -> None:
        """Give the lock up. In a forked child nothing happens: the lock is the parent's."""
        if self._fd is not None and os.getpid() == self._pid:
            fd, self._fd = self._fd, None
            _held.pop(self._key, None)
            os.close(fd)


def holds(path: Path | str, dir_fd: int | None = None) -> bool:
    """Whether this very process holds the lock on ``path``. Opens nothing."""
    try:
        found = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
    except OSError:
        return False
    return _held.get(_identity(found)) == os.getpid()


def open_question(path: Path | str, dir_fd: int | None = None) -> int | None:
    """A descriptor to ask :func:`is_held` on; None where there is no such regular file, or this process holds it."""
    try:
        if not stat.S_ISREG(os.stat(path, dir_fd=dir_fd, follow_symlinks=False).st_mode) or holds(path, dir_fd):
            return None
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)
    except OSError:
        return None


def is_held(fd: int) -> bool:
    """Whether another process holds the lock on an open file. Never takes it."""
    return _ask(fd) is not None


def holder(fd: int) -> int | None:
    """The process that holds the lock on an open file, as this PID namespace counts; None where it sees none."""
    return _ask(fd) or None


def _ask(fd: int) -> int | None:
    try:
        answer = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)))
    except OSError:
        return None
    return None if answer[0] == fcntl.F_UNLCK else int(answer[4])


def is_locked(path: Path) -> bool:
    """Whether any process holds the lock on ``path``. Never takes it, never drops one's own.

    A missing or unreadable file counts as free.
    """
    if holds(path):
        return True
    fd = open_question(path)
    if fd is None:
        return False
    try:
        return is_held(fd)
    finally:
        os.close(fd)


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
