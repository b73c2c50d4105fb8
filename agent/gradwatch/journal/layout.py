"""Where things stand: names of files and directories of a journal."""

from __future__ import annotations

import errno
import itertools
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gradwatch.journal.errors import JournalError

MANIFEST = "manifest.json"
STEPS = "steps.ring"
TENSORS = "tensors.ring"
SAMPLES = "samples.ring"
EVENTS = "events.jsonl"
LOCK = "lock"
#: Written by the trainer's process where SIGTERM ended it: the stack of that moment. Empty otherwise.
SIGTERM = "sigterm"

#: A run's directory name. Leading dots are left to the agent's own state.
RUN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")
_RANK = re.compile(r"rank-(0|[1-9][0-9]{0,5})")
_ATTEMPT = re.compile(r"attempt-(0|[1-9][0-9]{0,5})")


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """One attempt of one rank of one run, and its directory."""

    run: str
    rank: int
    attempt: int
    path: Path


def attempt_directory(root: Path, run: str, rank: int, attempt: int) -> Path:
    """The directory of an attempt. Raises ``JournalError`` for a name that would leave the root."""
    if not RUN_NAME.fullmatch(run):
        raise JournalError(f"run name {run!r}: use 1 to 128 letters, digits, '.', '_' or '-', not starting with a dot")
    for name, value in (("rank", rank), ("attempt", attempt)):
        if not 0 <= value < 1_000_000:
            raise JournalError(f"{name} {value}: must be between 0 and 999999")
    return root / run / f"rank-{rank}" / f"attempt-{attempt}"


def place_of(directory: Path) -> Place | None:
    """Which attempt a directory stands for by its name; None where it is not named like one."""
    path = directory.absolute()
    rank, attempt = _RANK.fullmatch(path.parent.name), _ATTEMPT.fullmatch(path.name)
    run = path.parent.parent.name
    if not (rank and attempt and RUN_NAME.fullmatch(run)):
        return None
    return Place(run, int(rank[1]), int(attempt[1]), directory)


# -- finding and opening, never through a symbolic link

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


def find_attempts(root: Path, limit: int = 100_000) -> Iterator[Place]:
    """All attempts below ``root``, in no order, at most ``limit``.

    Symbolic links, files, and names that are not the journal's are passed
    over: whoever writes below the root must not be able to lead a reader out
    of it. An unreadable or vanishing directory counts as empty.
    """
    return itertools.islice(_attempts(root), limit)


def _attempts(root: Path) -> Iterator[Place]:
    for run, run_fd in _subdirectories(root, RUN_NAME):
        for rank, rank_fd in _subdirectories(run_fd, _RANK):
            for attempt, _ in _subdirectories(rank_fd, _ATTEMPT):
                yield Place(run[0], int(rank[1]), int(attempt[1]), root / run[0] / rank[0] / attempt[0])


def _subdirectories(parent: Path | int, names: re.Pattern[str]) -> Iterator[tuple[re.Match[str], int]]:
    """Real directories in ``parent`` whose names match, each with a descriptor that is open for its turn."""
    try:
        with os.scandir(parent) as entries:
            found = [match for entry in entries if (match := names.fullmatch(entry.name))]
        # A descriptor of the parent, so that what is opened below it is what was listed.
        above = os.dup(parent) if isinstance(parent, int) else os.open(parent, _DIRECTORY)
    except OSError:
        return
    try:
        for match in found:
            try:
                fd = os.open(match[0], _DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
            except OSError:
                continue
            try:
                yield match, fd
            finally:
                os.close(fd)
    finally:
        os.close(above)


def open_attempt(directory: Path) -> int:
    """Open an attempt's directory. Raises ``OSError`` where it, its rank or its run is a symbolic link.

    The root above these three may be reached as its owner likes.
    """
    root, names = _split(directory)
    fd = os.open(root, _DIRECTORY)
    for name in names:
        fd = _step_down(fd, name)
    return fd


def create_attempt(directory: Path) -> tuple[int, bool]:
    """Create and open an attempt's directory; return a descriptor and whether it is shared with a group."""
    root, names = _split(directory)
    make_private_directory(root)
    fd = os.open(root, _DIRECTORY)
    for name in names:
        shared = _is_shared(fd)
        try:
            os.mkdir(name, 0o700, dir_fd=fd)
            created = True
        except FileExistsError:
            created = False
        except BaseException:
            os.close(fd)
            raise
        fd = _step_down(fd, name)
        if created and shared:
            os.fchmod(fd, 0o2750)
    return fd, _is_shared(fd)


def open_regular(name: str, dir_fd: int) -> int:
    """Open a file to read it. Raises ``OSError`` for anything but a regular file, and never waits for a FIFO."""
    if stat.S_ISREG(os.stat(name, dir_fd=dir_fd, follow_symlinks=False).st_mode):
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)
        if stat.S_ISREG(os.fstat(fd).st_mode):
            return fd
        os.close(fd)
    raise OSError(errno.EINVAL, "not a regular file", name)


def _split(directory: Path) -> tuple[Path, list[str]]:
    path = directory.absolute()
    parts = path.parts[-3:] if len(path.parts) > 3 else path.parts[1:]
    return Path(*path.parts[: len(path.parts) - len(parts)]), list(parts)


def _step_down(fd: int, name: str) -> int:
    """A directory's real subdirectory, in exchange for its own descriptor."""
    try:
        return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
    except NotADirectoryError:
        raise NotADirectoryError(
            errno.ENOTDIR, "not a directory (symbolic links are not followed here)", name
        ) from None
    finally:
        os.close(fd)


def _is_shared(fd: int) -> bool:
    return bool(os.fstat(fd).st_mode & stat.S_ISGID)


def make_private_directory(path: Path) -> bool:
    """Create ``path`` and its parents with mode 0700; return whether it is shared with a group.

    Below a setgid directory (a volume shared between the trainer's and the
    agent's users) new directories become 2750 instead, so that the group can
    read what the owner writes.
    """
    missing = []
    probe = path
    while not probe.exists():
        missing.append(probe)
        probe = probe.parent
    shared = bool(probe.stat().st_mode & stat.S_ISGID)
    for directory in reversed(missing):
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            continue
        if shared:
            directory.chmod(0o2750)
    return shared
