"""Runs that nobody finished, as where a search tries two hundred models and forgets each.

A run lives as long as somebody holds it, its optimizer, or an exception that
remembers them. Nothing global keeps it: what listens is held weakly. When all
are gone the garbage collector comes by, the run's end is written, its journal
closed. What must not be done in the middle of whatever the collector
interrupted, such as taking a lock, waits for the next run.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import deque
from collections.abc import Sized
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from gradwatch.probe import ends

if TYPE_CHECKING:
    from gradwatch.probe.run import Run
    from gradwatch.probe.session import Session

#: Runs under way in a process beyond which the garbage collector is asked whether any of them is forgotten.
MANY: Final = 8

_to_close: deque[ends.EndWatch] = deque()
_asked_at = MANY


def end(run: Run, session: Session) -> None:
    """The collector found that nobody knows of ``run`` any more. Takes no lock, waits for nothing, never raises."""
    if sys.is_finalizing() or os.getpid() != session.writer.manifest.pid:
        return  # a forked child: the run and its files are its parent's
    try:
        session.detach()
        if run._ends is not None:
            _to_close.append(run._ends)
        if not session.aside.off:
            session.recorder.flush()
            session.lane.poll()
        how = ends.pending() or ends.End("finished")
        if how.state == "finished":
            how = replace(how, reason="let go of without finish()")
        session.event("end", **how.to_event())
        session.writer.close()
        if run._agent is not None:
            run._agent.finished(run.id, wait=False)
    except Exception:
        pass  # it is a finalizer: there is nobody to tell


def clear_up(sessions: Sized) -> None:
    """Before a new run: close what forgotten ones left, and where many are under way, look for more of them.

    Objects that refer to each other and have lived long are looked at rarely
    by Python itself; models would pile up until then.
    """
    global _asked_at
    if len(sessions) >= _asked_at:
        gc.collect()
        _asked_at = MANY + 2 * len(sessions)  # those are alive
    elif len(sessions) < MANY:
        _asked_at = MANY
    while _to_close:
        _to_close.popleft().close()
