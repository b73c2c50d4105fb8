"""How a process that had a parent of ours ended, exactly: one small file, written by the parent, read by the agent.

``gradwatch run`` names itself in ``GRADWATCH_PARENT``, the trainer copies that
name into its manifest, and ``<root>/.parent/<name>.json`` says how the command
ended. It is as trusted as a journal: bounded, never through a symbolic link,
a value of a wrong type counts as absent.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from gradwatch.journal.layout import make_private_directory, open_regular

DIRECTORY: Final = ".parent"
NAME: Final = re.compile(r"[0-9a-f]{32}")
_LIMIT: Final = 4_096
#: How the reason of an ``end`` event begins that was written while the interpreter left, not knowing its own status.
UNKNOWN_STATUS: Final = "exit status unknown"


@dataclass(frozen=True, slots=True)
class Exit:
    """The end of a command.

    Attributes:
        pid: of the command, as its parent saw it.
        time: Unix time; 0 where nobody looked at a clock.
        exit_code: None where a signal ended it.
        signal: the signal's number, None where it exited.
        core_dumped: whether the kernel wrote a core dump.
        oom_kills: processes that the cgroup's memory limit has killed meanwhile; None where that cannot be read.
    """

    pid: int
    time: float
    exit_code: int | None = None
    signal: int | None = None
    core_dumped: bool = False
    oom_kills: int | None = None


def write_exit(root: Path, name: str, end: Exit) -> None:
    """Put an end in place, whole or not at all. Raises ``OSError``."""
    directory = root / DIRECTORY
    shared = make_private_directory(directory)
    temporary = directory / f"{name}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(fd, "w") as file:
        if shared:
            os.fchmod(file.fileno(), 0o640)
        json.dump(asdict(end), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(directory / f"{name}.json")


def read_exit(root: Path, name: str) -> Exit | None:
    """The end of the command below the parent of this name; None where none is told, or none that makes sense."""
    if not NAME.fullmatch(name):
        return None
    try:
        directory = os.open(root / DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            with os.fdopen(open_regular(f"{name}.json", directory), "rb") as file:
                document = json.loads(file.read(_LIMIT))
        finally:
            os.close(directory)
    except (OSError, ValueError, RecursionError):
        return None
    return _exit_of(document) if isinstance(document, dict) else None


def _exit_of(document: dict[str, Any]) -> Exit | None:
    def whole(key: str, limit: int) -> int | None:
        value = document.get(key)
        return value if type(value) is int and 0 <= value <= limit else None

    pid, time = whole("pid", 2**31), document.get("time")
    code, signal = whole("exit_code", 255), whole("signal", 64)
    if pid is None or (code is None) == (signal is None) or isinstance(time, bool):
        return None
    if not isinstance(time, int | float) or not 0 < time < 1e12:
        return None
    return Exit(pid, float(time), code, signal, document.get("core_dumped") is True, whole("oom_kills", 2**53))
