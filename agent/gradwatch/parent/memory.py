"""The cgroup's count of processes that its memory limit has killed."""

from __future__ import annotations

from pathlib import Path

_OWN = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")


def oom_kills(own: Path = _OWN, mount: Path = _MOUNT) -> int | None:
    """``oom_kill`` of this process's cgroup, of version 2 or 1; None where it cannot be read."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            candidates = [mount / path.lstrip("/") / "memory.events", mount / "memory.events"]
        elif "memory" in controllers.split(","):
            base = mount / "memory"
            candidates = [base / path.lstrip("/") / "memory.oom_control", base / "memory.oom_control"]
        else:
            continue
        for candidate in candidates:  # in a container the path is often the host's, and the mount its own cgroup
            count = _count(candidate)
            if count is not None:
                return count
    return None


def _count(file: Path) -> int | None:
    try:
        for line in file.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == "oom_kill" and value.isdigit():
                return int(value)
    except (OSError, UnicodeDecodeError):
        pass
    return None
