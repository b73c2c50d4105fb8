"""How a run lives and ends: what the trainer told, and what follows where it told nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from gradwatch.collect.model import RunEnd
from gradwatch.collect.pace import Pace
from gradwatch.journal.exits import UNKNOWN_STATUS, Exit, read_exit
from gradwatch.journal.layout import SIGTERM, open_attempt, open_regular
from gradwatch.journal.manifest import Manifest, clean_text

_TOLD: Final = ("finished", "failed", "killed")
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
#: Characters of a stack that are kept of a SIGTERM.
_STACK_LIMIT: Final = 4_000
#: Signals that say of a process that it broke, and not that somebody ended it.
_CRASHES: Final = ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL", "SIGSYS", "SIGTRAP")


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


def parents_word(manifest: Manifest, attempt: Path) -> Exit | None:
    """What ``gradwatch run`` tells of the process that wrote an attempt; None where it tells (so far) nothing."""
    if not manifest.parent:
        return None
    return read_exit(attempt.absolute().parents[2], manifest.parent)


def sigterm_stack(attempt: Path) -> str:
    """Where training stood when SIGTERM ended it, bounded; "" where that was not its end."""
    try:
        directory = open_attempt(attempt)
        try:
            with os.fdopen(open_regular(SIGTERM, directory), "rb") as file:
                text = file.read(4 * _STACK_LIMIT).decode(errors="replace")
        finally:
            os.close(directory)
    except OSError:
        return ""
    return "\n".join(clean_text(line) for line in text.splitlines())[:_STACK_LIMIT]


def is_settled(end: RunEnd | None) -> bool:
    """Whether a told end needs no parent's word: one from ``atexit`` does not know the exit status."""
    return end is not None and (end.state != "finished" or end.exit_code is not None)


def awaits_status(end: RunEnd | None) -> bool:
    """Whether an end was told while the interpreter left, and its status is still to come."""
    return end is not None and end.exit_code is None and end.reason.startswith(UNKNOWN_STATUS)


def exit_of(status: int, manifest: Manifest) -> Exit:
    """A wait status that the kernel told of the process that wrote an attempt."""
    if os.WIFSIGNALED(status):
        return Exit(manifest.pid, 0.0, signal=os.WTERMSIG(status), core_dumped=os.WCOREDUMP(status))
    return Exit(manifest.pid, 0.0, exit_code=os.WEXITSTATUS(status))


def true_end(told: RunEnd | None, word: Exit | None, stack: str, manifest: Manifest, untold: RunEnd) -> RunEnd:
    """How an attempt ended, by the best witness.

    The trainer itself, where it knew; else its parent, or the kernel; else the
    stack that SIGTERM left; else ``untold``, with what the parent says of a launcher between the two.
    """
    if told is not None and is_settled(told):
        return told
    if word is not None and word.pid == manifest.pid:
        if told is not None and word.exit_code == 0:
            return replace(told, exit_code=0, reason="" if awaits_status(told) else told.reason)
        return _exact_end(word, stack, told or untold)
    if told is not None:
        return told
    if stack:
        return replace(untold, state="killed", reason="SIGTERM", type="SIGTERM", message=stack, signal=15)
    if word is not None:
        return replace(untold, reason=_bounded_guess(word))
    return untold


def _exact_end(word: Exit, stack: str, known: RunEnd) -> RunEnd:
    end = replace(known, time=word.time or known.time, exit_code=word.exit_code, signal=word.signal)
    oom = "out of memory: the cgroup's limit killed it" if word.oom_kills else ""
    if word.signal is not None:
        name = _signal_name(word.signal)
        if name in _CRASHES:
            return replace(end, state="failed", reason=f"crashed by {name}" + ", core dumped" * word.core_dumped)
        if word.signal == signal.SIGTERM:
            return replace(end, state="killed", reason=name, type=name if stack else "", message=stack)
        return replace(end, state="killed", reason=f"{oom} ({name})" if oom and word.signal == 9 else name)
    if word.exit_code == 0:
        return replace(end, state="finished", reason="exit status 0, and no word from within (os._exit)")
    if word.exit_code == 128 + signal.SIGKILL:
        reason = f"{oom} (exit status 137)" if oom else "exit status 137: SIGKILL, as out of memory makes it"
        return replace(end, state="killed", reason=reason)
    return replace(end, state="failed", reason=f"exit status {word.exit_code}")


def _bounded_guess(word: Exit) -> str:
    how = f"exit status {word.exit_code}" if word.signal is None else _signal_name(word.signal)
    oom = f"; out of memory: the cgroup's limit killed {word.oom_kills} of its processes" if word.oom_kills else ""
    return f"the process is gone and left no word; its launcher ended with {how}{oom}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


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
