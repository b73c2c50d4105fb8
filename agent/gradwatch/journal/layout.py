"""Where things stand: names of files and directories of a journal."""

from __future__ import annotations

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
        raise JournalError(
            f"run name {run!r}: use 1 to 128 letters, digits, '.', '_' or '-', not starting with a dot"
        )
    return root / run / f"rank-{rank}" / f"attempt-{attempt}"


def find_attempts(root: Path, limit: int = 100_000) -> Iterator[Place]:
    """All attempts below ``root``, in no order, at most ``limit``.

    Symbolic links, files, and names that are not the journal's are passed
    over: whoever writes below the root must not be able to lead a reader out
    of it. An unreadable or vanishing directory counts as empty.
    """
    found = 0
    for run in _directories(root):
        if not RUN_NAME.fullmatch(run.name):
            continue
        for rank in _directories(Path(run.path)):
            if not (rank_match := _RANK.fullmatch(rank.name)):
                continue
            for attempt in _directories(Path(rank.path)):
                if not (attempt_match := _ATTEMPT.fullmatch(attempt.name)):
                    continue
                yield Place(run.name, int(rank_match[1]), int(attempt_match[1]), Path(attempt.path))
                found += 1
                if found >= limit:
                    return


def _directories(path: Path) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    if entry.is_dir(follow_symlinks=False):
                        yield entry
                except OSError:
                    continue
    except OSError:
        return


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
