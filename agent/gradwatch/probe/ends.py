"""How the process ends, noticed from within it, without changing how it ends.

==========================  ==============================================  ============
end                         noticed by                                      state
==========================  ==============================================  ============
uncaught exception          ``sys.excepthook``                              failed
``sys.exit(n)``, ``exit``   the call, believed once nobody has caught it    finished if 0
Ctrl-C                      ``sys.excepthook``                              killed
SIGTERM                     `gradwatch.probe.sigterm`                       killed
a ``multiprocessing`` end   its finalizers, which see the exception         any of these
none of these               ``atexit``                                      finished
==========================  ==============================================  ============

What kills a process from outside (SIGKILL, a segmentation fault, ``os._exit``)
is for the agent to tell: the journal's lock is free and no end is written.
``raise SystemExit(3)``, outside of a ``with`` block of the run, passes through
no Python code on its way out: ``atexit`` sees an orderly end and not its status,
and the reason says so. The agent makes it true where ``gradwatch run`` or the
kernel tells the status.

Former hooks are called in turn and put back; forked children are left alone;
exit codes and printed tracebacks stay what they are.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn

from gradwatch.journal.exits import UNKNOWN_STATUS
from gradwatch.probe.secrets import scrub
from gradwatch.probe.sigterm import SigtermWatch

MESSAGE_LIMIT: Final = 2_000


@dataclass(frozen=True, slots=True)
class End:
    """An end: what the journal's ``end`` event says.

    Attributes:
        state: ``finished``, ``failed`` or ``killed``.
        reason: one line for people.
        type, message: of the exception, if there was one; secrets redacted, bounded.
        exit_code: as the parent will see it, None where it is not known.
        signal: the signal's number, if one ended the process.
    """

    state: str
    reason: str = ""
    type: str = ""
    message: str = ""
    exit_code: int | None = None
    signal: int | None = None

    def to_event(self) -> dict[str, Any]:
        """As the keys of an ``end`` event."""
        return asdict(self)


#: The interpreter leaves in order, nobody called `finish`, and the status is for others to tell.
UNKNOWN: Final = End("finished", f"{UNKNOWN_STATUS}: the interpreter left in order, without run.finish()")


def end_of(error: BaseException | None) -> End:
    """The end that an exception makes which nobody catches; None is a normal end."""
    if error is None:
        return End("finished", exit_code=0)
    if isinstance(error, SystemExit):
        return _end_of_exit(error)
    name, message = type(error).__qualname__, _message(error)
    if isinstance(error, KeyboardInterrupt):  # Python dies of SIGINT then, so that a shell stops too
        return End("killed", "interrupted (KeyboardInterrupt)", name, message, signal=2)
    if isinstance(error, GeneratorExit):
        return End("finished", "the generator that held the run was closed", exit_code=None)
    return End("failed", _line(name, message), name, message, exit_code=1)


def _end_of_exit(error: SystemExit) -> End:
    code = error.code
    if code is None or (isinstance(code, int) and code & 0xFF == 0):
        return End("finished", exit_code=0)
    status = code & 0xFF if isinstance(code, int) else 1
    cause = error.__cause__ or error.__context__
    if cause is not None and not isinstance(cause, SystemExit):  # `except Exception: log(); sys.exit(1)`
        name, message = type(cause).__qualname__, _message(cause)
        return End("failed", f"exit status {status} after {_line(name, message)}", name, message, status)
    message = "" if isinstance(code, int) else _bounded(code if isinstance(code, str) else type(code).__name__)
    reason = f"exit status {status}" + (f": {message}" if message else "")
    return End("failed", reason.splitlines()[0][:300], "SystemExit", message, status)


def _message(error: BaseException) -> str:
    try:
        if any("torch" in type(argument).__module__ for argument in error.args):
            return ""  # the text of a tensor is its values, and those would have to come from its device
        return _bounded(str(error))
    except Exception:
        return ""


def _bounded(text: str) -> str:
    text = scrub(text)
    return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"


def _line(name: str, message: str) -> str:
    first = message.strip().partition("\n")[0]
    return f"{name}: {first}"[:300] if first else name


# -- watching


class EndWatch:
    """Calls back once, at the first end that is noticed; `close` when the run has ended by itself."""

    def __init__(self, callback: Callable[[End], object]) -> None:
        self._callback = callback
        self._told = False

    def tell(self, end: End) -> None:
        if not self._told:
            self._told = True
            try:
                self._callback(end)
            except Exception:
                pass  # the process ends; nothing of ours may change how

    def close(self) -> None:
        """Stop watching; the last one puts all hooks back. May be called twice."""
        self._told = True
        if self in _watches:
            _watches.remove(self)
            _sigterm.discard(self)
            if not _watches:
                _hooks.restore()


def watch_process_end(callback: Callable[[End], object], evidence: Path | None = None) -> EndWatch:
    """Call ``callback`` with the `End` when this process ends; at most once, never after ``close()``.

    Args:
        callback: runs on the main thread, while the process ends; what it raises is swallowed.
        evidence: a file to be written at SIGTERM, which then ends the process at once as it
            would have without us; see `gradwatch.probe.sigterm`. Without it a handler in
            Python calls back, which has to wait for the main thread to leave C code.
    """
    watch = EndWatch(callback)
    if not _watches:
        _hooks.install()
    _watches.append(watch)
    _sigterm.add(watch, evidence)
    return watch


def pending() -> End | None:
    """The end that is under way, if ``sys.exit`` was called and nobody has caught it."""
    return _hooks.pending


_watches: list[EndWatch] = []


def _tell(end: End) -> None:
    for watch in list(_watches):
        watch.tell(end)


class _PendingExit:
    """Rides on a SystemExit: dies with it, and knows by the stack whether somebody caught it."""

    def __init__(self, end: End) -> None:
        self.end = end

    def __del__(self) -> None:
        if _hooks.pending is self.end and _main_is_running():
            _hooks.pending = None


def _main_is_running() -> bool:
    """Whether the main module's code is still on the stack: then this is not the end."""
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_globals.get("__name__") == "__main__":
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


class _Hooks:
    """The interpreter's hooks: installed for the first watch, put back after the last.

    Each installation has functions of its own that know what they replaced.
    Where somebody has hooked in after us, ours must stay below theirs; it then
    only passes on, and a later installation goes on top without a circle.
    """

    def __init__(self) -> None:
        self.pending: End | None = None
        self._put: list[tuple[Any, str, Any, Any]] = []
        self._finalizer: Any = None

    def install(self) -> None:
        self.pending = None
        self._replace(sys, "excepthook", _excepthook_before)
        self._replace(sys, "exit", _exit_before)
        if "_sitebuiltins" in sys.modules:
            self._replace(sys.modules["_sitebuiltins"].Quitter, "__call__", _quit_before)
        atexit.register(_atexit)
        self._finalizer = _finalize_in_multiprocessing()

    def restore(self) -> None:
        while self._put:
            owner, name, former, ours = self._put.pop()
            if getattr(owner, name) is ours:
                setattr(owner, name, former)
        atexit.unregister(_atexit)
        if self._finalizer is not None:
            self._finalizer.cancel()
            self._finalizer = None
        self.pending = None

    def _replace(self, owner: Any, name: str, before: Callable[[Any], Any]) -> None:
        former = getattr(owner, name)
        ours = before(former)
        self._put.append((owner, name, former, ours))
        setattr(owner, name, ours)


_hooks: Final = _Hooks()


def _excepthook_before(former: Callable[..., Any]) -> Callable[..., Any]:
    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        # A prompt goes on after an exception, and so does code that calls the hook to print one.
        if _watches and not hasattr(sys, "ps1") and not sys.flags.inspect and not _main_is_running():
            _tell(end_of(error))
        former(kind, error, trace)

    return excepthook


def _exit_before(former: Callable[..., NoReturn]) -> Callable[..., NoReturn]:
    def exit(status: Any = None, /) -> NoReturn:
        try:
            former(status)
        except SystemExit as error:
            _remember(error)
            raise

    return exit


def _quit_before(former: Callable[..., Any]) -> Callable[..., Any]:
    def __call__(self: Any, code: Any = None) -> Any:  # noqa: N807 (it is put in the place of one)
        try:
            return former(self, code)
        except SystemExit as error:
            _remember(error)
            raise

    return __call__


def _remember(error: SystemExit) -> None:
    if _watches and _in_main_thread():  # elsewhere it ends a thread
        _hooks.pending = end_of(error)
        error._gradwatch_pending = _PendingExit(_hooks.pending)  # type: ignore[attr-defined]


def _atexit() -> None:
    _tell(_hooks.pending or UNKNOWN)


def _finalize_in_multiprocessing() -> Any:
    """In a child of `multiprocessing`: its finalizers run where the exception is still in flight, ``atexit`` never."""
    process: Any = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None:
        return None
    from multiprocessing.util import Finalize

    return Finalize(None, _multiprocessing_end, exitpriority=0)


def _multiprocessing_end() -> None:
    _tell(end_of(sys.exc_info()[1]))


_sigterm: Final = SigtermWatch(lambda: _tell(End("killed", "SIGTERM", signal=15)))


def _forget() -> None:
    """In a forked child: its end is not the run's, and the parent's files are not its own."""
    _sigterm.forget()
    for watch in list(_watches):
        watch.close()


os.register_at_fork(after_in_child=_forget)
