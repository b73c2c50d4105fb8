"""SIGTERM, told without standing in its way.

A handler in Python runs only when the main thread is back in Python code. A
rank that waits inside a collective would then outlive its SIGTERM until the
SIGKILL that follows 30 seconds later, and Lightning installs its own graceful
handler only where it sees none. So evidence is left from C:
`faulthandler.register` writes the stack at which the signal came to a file,
then hands the signal to the default action. The process dies at once, its
status is -15, `signal.getsignal` shows nothing, and the agent finds a file that
is not empty, with the place where training stood.

Where there is no file to write, a Python handler calls back and then dies of
the same signal.

A handler that is there already, in Python or in C, is never touched.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import IO, Any


class SigtermWatch:
    """SIGTERM on behalf of several watches."""

    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback = callback
        self._files: dict[int, tuple[Path, IO[bytes]]] = {}
        self._plain: set[int] = set()
        self._registered: int | None = None
        self._handling = False

    def add(self, watch: object, evidence: Path | None) -> None:
        """Watch on behalf of ``watch``; never raises."""
        try:
            if evidence is not None:
                self._leave_evidence(id(watch), evidence)
            elif self._registered is None:
                self._handle(id(watch))
        except (OSError, ValueError, RuntimeError):
            pass

    def discard(self, watch: object) -> None:
        """Stop on behalf of ``watch``; the last one leaves SIGTERM as it was found."""
        self._plain.discard(id(watch))
        path, file = self._files.pop(id(watch), (None, None))
        if self._registered == id(watch):
            self._unregister()
            if self._files:
                self._register(next(iter(self._files)))
        if file is not None and path is not None:
            file.close()
            try:
                if path.stat().st_size == 0:
                    path.unlink()
            except OSError:
                pass
        if not self._plain and self._handling:
            self._unhandle()

    def forget(self) -> None:
        """In a forked child: SIGTERM there is none of the run's business."""
        if self._registered is not None:
            self._unregister()
        self._files.clear()  # their descriptors close; the parent's stay
        self._plain.clear()
        if self._handling:
            self._unhandle()

    # -- evidence

    def _leave_evidence(self, key: int, path: Path) -> None:
        if self._registered is None and not _is_default():
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        if self._files:  # one signal has one file; the others are further names of it
            first = self._files[self._registered][0] if self._registered is not None else None
            if first is not None:
                os.link(first, path)
        self._files[key] = path, os.fdopen(os.open(path, flags, 0o600), "wb", buffering=0)
        if path.parent.stat().st_mode & stat.S_ISGID:  # shared with the agent's user, as all of the journal then is
            os.fchmod(self._files[key][1].fileno(), 0o640)
        if self._registered is None:
            self._register(key)

    def _register(self, key: int) -> None:
        faulthandler.register(signal.SIGTERM, file=self._files[key][1], all_threads=False, chain=True)
        self._registered = key

    def _unregister(self) -> None:
        # Unregistering restores what we found, also over a handler that came later; that one stays.
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            faulthandler.unregister(signal.SIGTERM)
        self._registered = None

    # -- a handler in Python

    def _handle(self, key: int) -> None:
        if not self._handling:
            if threading.current_thread() is not threading.main_thread() or not _is_default():
                return
            signal.signal(signal.SIGTERM, self._handler)
            self._handling = True
        self._plain.add(key)

    def _handler(self, number: int, frame: FrameType | None) -> None:
        self._callback()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    def _unhandle(self) -> None:
        ours: Any = self._handler
        if threading.current_thread() is not threading.main_thread():
            return  # cannot be put back from here; without watches it calls nobody, and dies as it should
        if signal.getsignal(signal.SIGTERM) == ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self._handling = False


def _is_default() -> bool:
    """Whether SIGTERM has its default action; the kernel knows of handlers in C, Python does not."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return False
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return True
    bit = 1 << (signal.SIGTERM - 1)
    masks = dict(line.split(":\t", 1) for line in status.splitlines() if line.startswith(("SigCgt", "SigIgn")))
    return not any(int(mask, 16) & bit for mask in masks.values())
