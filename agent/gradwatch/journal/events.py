"""``events.jsonl``: what happens beside the steps, one JSON object a line, in two bounded generations.

Every event carries a sequence number, so that a reader knows what it has seen
and what it missed without trusting names or inodes, which are used again.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from typing import Any, Final

from gradwatch.journal.layout import EVENTS, open_regular
from gradwatch.journal.manifest import clean_text, plain

#: Longer events are not written, and not read.
MAX_EVENT_BYTES: Final = 2**20
#: The generation before the present one.
ROTATED: Final = f"{EVENTS}.1"
_FRESH: Final = f".{EVENTS}.new"
_FIRST = re.compile(rb'^\{"sequence":([0-9]{1,18}),', re.MULTILINE)


class EventLog:
    """The writing side. Not more than ``limit`` bytes on disk, both generations together."""

    def __init__(self, dir_fd: int, limit: int, mode: int) -> None:
        self._dir_fd, self._half, self._mode = dir_fd, limit // 2, mode
        self.sequence = 0
        self._size = 0
        self._torn = False
        self._inert = False
        self._fd = self._open(EVENTS)

    def _open(self, name: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(name, flags, self._mode, dir_fd=self._dir_fd)
        os.fchmod(fd, self._mode)
        return fd

    def write(self, event: dict[str, Any]) -> None:
        """Append one event; NaN and infinity are allowed and written as JavaScript writes them.

        Raises ``OSError`` where it cannot be stored (the log stays usable), and
        ``ValueError`` for an event that no reader would take.
        """
        if self._inert:
            return
        numbered = {"sequence": self.sequence + 1} | {k: v for k, v in event.items() if k != "sequence"}
        line = json.dumps(numbered, ensure_ascii=True, separators=(",", ":"), default=str).encode() + b"\n"
        most = min(MAX_EVENT_BYTES, self._half)
        if len(line) > most:
            raise ValueError(
                f"event {event.get('kind')!r} of {len(line)} bytes: at most {most} are kept; say less in it"
            )
        if self._size + len(line) > self._half:
            self._rotate()
        # The line that a full disk cut short is ended first, so that this one stands on a line of its own.
        data = b"\n" + line if self._torn else line
        written = os.write(self._fd, data)
        self._size += written
        self._torn = written < len(data) and (self._torn or written > 0)
        if written < len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), EVENTS)
        self.sequence += 1

    def _rotate(self) -> None:
        """Begin a new file. Whatever fails here leaves the present one as it is, open and in its place."""
        try:
            os.unlink(_FRESH, dir_fd=self._dir_fd)
        except FileNotFoundError:
            pass
        fd = self._open(_FRESH)
        try:
            os.rename(EVENTS, ROTATED, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
            os.rename(_FRESH, EVENTS, src_dir_fd=self._dir_fd, dst_dir_fd=self._dir_fd)
        except OSError:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._size, self._torn = fd, 0, False

    def disown(self) -> None:
        """In a forked child: write nothing any more, the log is the parent's."""
        self._inert = True

    def close(self) -> None:
        os.close(self._fd)


class EventTail:
    """The reading side: each event once, in order, over rotations and restarts."""

    def __init__(self, dir_fd: int) -> None:
        self._dir_fd = dir_fd
        #: Sequence number of the next event, and how far which file (named by its first event) has been read.
        self._next, self._file, self._offset = 1, 0, 0
        #: Whether the last :meth:`read` stopped at its limit.
        self.cut = False

    @property
    def cursor(self) -> list[int]:
        return [self._next, self._file, self._offset]

    def restore(self, cursor: object) -> None:
        if isinstance(cursor, list) and len(cursor) == 3 and all(type(v) is int and 0 <= v < 2**62 for v in cursor):
            self._next, self._file, self._offset = cursor

    def read(self) -> tuple[list[dict[str, Any]], int]:
        """New events, at most a megabyte of them, and how many were rotated away before they were seen."""
        self.cut = False
        events: list[dict[str, Any]] = []
        missed = 0
        # The present file is opened first: should it be rotated now, it is the same file twice, and none is skipped.
        opened = [fd for name in (EVENTS, ROTATED) if (fd := self._open(name)) is not None]
        try:
            room = MAX_EVENT_BYTES
            for first, fd in sorted({_first_sequence(fd): fd for fd in opened}.items()):
                if first < self._file:
                    continue
                if first > self._file:
                    self._file, self._offset = first, 0
                data = self._lines(fd, room)
                room -= len(data)
                for line in data.splitlines():
                    event = parse_event(line)
                    if event is None:
                        continue
                    number = event["sequence"]
                    if number and number < self._next:
                        continue
                    if number:
                        missed += number - self._next
                        self._next = number + 1
                    events.append(event)
                if self.cut:
                    break
        except OSError:
            pass
        finally:
            for fd in opened:
                os.close(fd)
        return events, missed

    def _open(self, name: str) -> int | None:
        try:
            return open_regular(name, self._dir_fd)
        except OSError:
            return None

    def _lines(self, fd: int, room: int) -> bytes:
        """Whole lines from the offset on; the offset moves behind them."""
        data = os.pread(fd, room, self._offset)
        self.cut = len(data) == room
        end = data.rfind(b"\n") + 1
        if not end and self.cut and room == MAX_EVENT_BYTES:
            end = len(data)  # no event is that long: pass over it
        self._offset += end
        return data[:end]


def parse_event(line: bytes) -> dict[str, Any] | None:
    """An event from its line, bounded and with its common keys in their types; None where it is none."""
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        return None
    event: dict[str, Any] = plain(found)
    event["kind"] = clean_text(event["kind"], 100)
    event["time"] = _finite(event.get("time"))
    for key, default in (("sequence", 0), ("row", 0), ("step", -1)):
        if type(event.get(key)) is not int:
            event[key] = default
    if not 0 <= event["sequence"] < 2**62:
        event["sequence"] = 0
    return event


def _finite(value: object) -> float:
    return float(value) if type(value) in (int, float) and math.isfinite(value) else 0.0  # type: ignore[arg-type]


def _first_sequence(fd: int) -> int:
    """A file's name for itself: the number of its first event, 0 where there is none yet."""
    match = _FIRST.search(os.pread(fd, 4096, 0))  # a full disk may have cut the first line short
    return int(match[1]) if match else 0
