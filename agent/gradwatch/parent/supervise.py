"""One child: started, sent the signals that we are sent, waited for, and its end taken over.

All signals of interest are blocked and fetched one by one (``sigtimedwait``), so
that there is no handler to race with and none can be lost between two lines. The
child starts with the mask and the dispositions that we were started with.

=====================  =========================================================
signal                 what happens
=====================  =========================================================
TERM, HUP, USR1/2, …   forwarded
INT, QUIT              forwarded if sent by a process; a terminal's reach the
                       whole foreground group, and so the child, by themselves
TSTP                   likewise; then we stop too, and the shell sees its job stopped
CONT                   forwarded
CHLD                   everything that has ended is reaped, orphans too
=====================  =========================================================
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NoReturn

#: ``si_code`` of a signal that the kernel sent, as for Ctrl-C.
_FROM_KERNEL: Final = 0x80
_OF_THE_TERMINAL: Final = frozenset({signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP})
FORWARDED: Final = frozenset(
    {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
    | {signal.SIGTSTP, signal.SIGCONT, signal.SIGWINCH, signal.SIGALRM}
)
_WAITED: Final = FORWARDED | {signal.SIGCHLD}


class Child:
    """A command under our care. Raises ``OSError`` where it cannot be started."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
        # Python ignores SIGPIPE (and SIGXFSZ) for itself; a command must not inherit that.
        defaults = [signal.SIGPIPE, signal.SIGXFSZ]
        self.pid = os.posix_spawnp(command[0], list(command), dict(environment), setsigmask=before, setsigdef=defaults)
        self.status: int | None = None

    def wait(self) -> int:
        """Wait for the end, forwarding; the wait status. Reaps whatever else has ended meanwhile."""
        self._reap()
        while self.status is None:
            self._pass_on(signal.sigwaitinfo(_WAITED))
            self._reap()
        return self.status

    def _pass_on(self, info: signal.struct_siginfo) -> None:
        number = signal.Signals(info.si_signo)
        if number not in FORWARDED:
            return
        if not (number in _OF_THE_TERMINAL and info.si_code == _FROM_KERNEL):
            self._send(number)
        if number == signal.SIGTSTP and os.getpid() != 1:
            os.kill(os.getpid(), signal.SIGSTOP)
            self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        try:
            os.kill(self.pid, number)  # not reaped yet, so that the number is still its own
        except ProcessLookupError:
            pass

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.pid:
                self.status = status


def wait_patiently(done: Callable[[], bool], seconds: float, clock: Callable[[], float]) -> bool:
    """Wait until ``done``, for ``seconds`` at most, or until we are told to stop; whether it is done."""
    until = clock() + seconds
    stop = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
    while not done():
        if clock() >= until or signal.sigtimedwait(stop, 0.05) is not None:
            return done()
    return True


def end_like(status: int) -> NoReturn:
    """End as a child of this wait status did: its exit code, or killed by its signal.

    A PID 1 cannot be killed by a signal of its own; it exits with 128 + the signal's number, as shells do.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if not os.WIFSIGNALED(status):
        os._exit(os.waitstatus_to_exitcode(status))
    number = os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the core that matters is the child's
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    os.kill(os.getpid(), number)
    os._exit(128 + number)
