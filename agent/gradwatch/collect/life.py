"""How a run lives and ends: what the trainer told, and what follows where it told nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from gradwatch.collect.model import RunEnd
from gradwatch.collect.pace import Pace
from gradwatch.journal.manifest import Manifest, clean_text

_TOLD: Final = ("finished", "failed", "killed")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """This boot of this machine; "" where the kernel does not say."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def told_end(event: dict[str, Any]) -> RunEnd:
    """A run's end as its ``end`` event tells it; a state that is none counts as failed."""

    def text(key: str) -> str:
        return clean_text(event[key]) if isinstance(event.get(key), str) else ""

    def whole(key: str) -> int | None:
        value = event.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**31 else None

    state, time, step = text("state"), event.get("time"), event.get("step")
    return RunEnd(
        state=state if state in _TOLD else "failed",
        reason=text("reason"),
        time=float(time) if isinstance(time, int | float) and 0 < time < 1e12 else 0.0,
        last_step=step if isinstance(step, int) and abs(step) < 2**53 else -1,
        type=text("type"),
        message=text("message"),
        exit_code=whole("exit_code"),
        signal=whole("signal"),
    )


def untold_end(manifest: Manifest, here: str, time: float, last_step: int) -> RunEnd:
    """The end of a run whose lock is free and that told nothing: ``abrupt``, with what can be known of why.

    ``here`` is the boot id of the machine that looks; another one than the
    run's, on the same machine, says that it was rebooted.
    """
    if manifest.boot_id and here and manifest.boot_id != here:
        reason = "reboot: the machine was restarted (or the journal is looked at on another one)"
    else:
        reason = "the process is gone and left no word: SIGKILL, out of memory, os._exit or a crash"
    return RunEnd("abrupt", reason, time, last_step)


class Motion:
    """Whether a living run moves. Its clock cannot be set, so that a change of the wall clock stalls nothing."""

    def __init__(self, monotonic: Callable[[], float], wall: Callable[[], float]) -> None:
        self._monotonic, self._wall = monotonic, wall
        self._moved = -1e18

    def moved_at(self, time: float) -> None:
        """A step, an event or a new attempt of wall time ``time`` was read just now."""
        age = self._wall() - time
        self._moved = max(self._moved, self._monotonic() - max(0.0, age)) if age == age else self._moved

    def state(self, stepped: bool, pace: Pace) -> str:
        """``starting``, ``running`` or ``stalled``."""
        if self._monotonic() - self._moved > pace.allowance(stepped):
            return "stalled"
        return "running" if stepped else "starting"
