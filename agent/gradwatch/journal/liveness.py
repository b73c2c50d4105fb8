"""Whether a writer lives: a POSIX record lock, held for life and asked for without taking it.

A record lock is free however its process died, also while the dead process is
a zombie or a worker that it forked lives on (``flock`` is inherited and stays
held then). ``F_GETLK`` on a read-only descriptor asks for it without taking
it and sees it across PID namespaces. Its one trap: closing *any* descriptor of
the file drops the lock, so the holder opens the file once and never again.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

# struct flock on Linux with 64-bit off_t: short l_type, short l_whence, off_t l_start, off_t l_len, pid_t l_pid.
_FLOCK = struct.Struct("hhqqi4x")


class Lock:
    """An exclusive record lock on a file, held until :meth:`release` or the end of the process."""

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        """Create the file and take the lock. Raises ``BlockingIOError`` where another process holds it."""
        self.path = path
        self._pid = os.getpid()
        self._fd: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, mode)
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except OSError as error:
            os.close(self._fd)
            self._fd = None
            if isinstance(error, BlockingIOError | PermissionError):
                raise BlockingIOError(f"{path} is held by another process") from None
            raise

    def release(self) -> None:
        """Give the lock up. In a forked child nothing happens: the lock is the parent's."""
        if self._fd is not None and os.getpid() == self._pid:
            os.close(self._fd)
            self._fd = None


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock on ``path``. Never takes it.

    A missing or unreadable file counts as free. The caller must not be the
    holder: closing the descriptor used here would drop its own lock.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        query = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        answer = fcntl.fcntl(fd, fcntl.F_GETLK, query)
        return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(fd)
