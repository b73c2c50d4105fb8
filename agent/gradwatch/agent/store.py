"""What an agent keeps on disk: one file a run with cursors and folds together, and where it listens.

A file appears whole or not at all (temporary file, rename), so an agent that
is killed between two writes goes on from the last one: the rows behind that
cursor are in that fold, each once, and later ones are read again.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from gradwatch.journal.layout import RUN_NAME

LOCK: Final = "agent.lock"
ADDRESS: Final = "agent.json"
_RUNS: Final = "runs"
#: No state of ours is larger; a file that is was not written by an agent.
_MAX_BYTES: Final = 64 * 2**20


class Store:
    """The agent's own directory. Raises ``OSError`` where it cannot be made or written."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._runs = directory / _RUNS
        self._runs.mkdir(mode=0o700, exist_ok=True)
        for left in self._runs.glob(".*.tmp"):  # an agent was killed while it wrote
            left.unlink(missing_ok=True)

    def save(self, run: str, state: Mapping[str, Any]) -> None:
        """Keep the state of a run in place of the former one."""
        write_whole(self._path(run), json.dumps(state, separators=(",", ":")))

    def load(self, run: str) -> dict[str, Any] | None:
        """The state of a run; None where there is none, or none that can be read."""
        try:
            fd = os.open(self._path(run), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(fd, "rb") as file:
                state = json.loads(file.read(_MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        return state if isinstance(state, dict) else None

    def forget(self, run: str) -> None:
        with contextlib.suppress(OSError):
            self._path(run).unlink(missing_ok=True)

    def say(self, document: Mapping[str, Any]) -> None:
        """Write ``agent.json``: where this agent listens and what it has delivered."""
        write_whole(self.directory / ADDRESS, json.dumps(document, indent=1))

    def unsay(self) -> None:
        """The agent leaves: nobody should look for it any more."""
        with contextlib.suppress(OSError):
            (self.directory / ADDRESS).unlink(missing_ok=True)

    def _path(self, run: str) -> Path:
        if not RUN_NAME.fullmatch(run):
            raise ValueError(f"not a run's name: {run!r}")
        return self._runs / f"{run}.json"


def write_whole(path: Path, text: str) -> None:
    """Write a file, mode 0600, so that a reader sees the former one or this one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        with os.fdopen(os.open(temporary, flags, 0o600), "w") as file:
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
