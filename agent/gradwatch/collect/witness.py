"""How a process that is not our child ended, asked of the kernel.

A ``pidfd`` that was opened while the process lived knows, from Linux 6.15 on,
its wait status when it is gone (``PIDFD_GET_INFO``, include/uapi/linux/pidfd.h).
While nobody has reaped it, its line in ``/proc`` tells the same to its own user.
Where neither is there (an older kernel, another PID namespace) nobody testifies.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Final

_SIZE: Final = 64
#: _IOWR(0xFF, 11, struct pidfd_info) in its first version.
_GET_INFO: Final = (3 << 30) | (_SIZE << 16) | (0xFF << 8) | 11
_EXIT: Final = 1 << 3
_MASK: Final = struct.Struct("<Q")
_STATUS: Final = struct.Struct("<60xi")


class Witness:
    """Stands by one process from :meth:`of` to :meth:`close`."""

    def __init__(self, fd: int, pid: int) -> None:
        self._fd, self._pid = fd, pid

    @classmethod
    def of(cls, holder: Callable[[], int | None]) -> Witness | None:
        """Stand by whom ``holder`` names (the pid that holds a lock, as this namespace counts); None where it cannot.

        It is asked twice: who still holds the lock behind the opening is the process that was opened, not one
        that has got its number since.
        """
        pid = holder()
        if pid is None or pid <= 0:
            return None
        try:
            fd = os.pidfd_open(pid)
        except (OSError, AttributeError):
            return None
        witness = cls(fd, pid)
        if holder() != pid or witness._ask() is None:
            witness.close()
            return None
        return witness

    def status(self) -> int | None:
        """The wait status; None while the process lives, and where the kernel does not say."""
        info = self._ask()
        if info is not None and _MASK.unpack_from(info)[0] & _EXIT:
            return int(_STATUS.unpack_from(info)[0])
        return self._of_zombie()

    def _ask(self) -> bytes | None:
        if self._fd < 0:
            return None
        info = bytearray(_SIZE)
        _MASK.pack_into(info, 0, _EXIT)
        try:
            fcntl.ioctl(self._fd, _GET_INFO, info)
        except OSError:
            return None
        return bytes(info)

    def _of_zombie(self) -> int | None:
        gone = select.poll()
        try:
            gone.register(self._fd, select.POLLIN)
            if not gone.poll(0):
                return None
            fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
            signal.pidfd_send_signal(self._fd, 0)  # it is not reaped yet, so that what was read is its own
            return int(fields[49]) if fields[0] == "Z" else None
        except (OSError, ValueError, IndexError):
            return None

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
