"""Which runs a command has recorded, and whether the agent has delivered their ends."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from gradwatch.journal import JournalError, find_attempts
from gradwatch.journal.layout import LOCK, MANIFEST, open_attempt, open_regular
from gradwatch.journal.liveness import is_locked
from gradwatch.journal.manifest import MAX_BYTES, parse
from gradwatch.parent.supervise import wait_patiently
from gradwatch.probe.launch import AgentHandle, agent_document


def runs_of(root: Path, parent: str) -> set[str]:
    """Names of the runs below ``root`` that were recorded below this parent."""
    return {place.run for place in find_attempts(root) if _parent_of(place.path) == parent}


def _parent_of(attempt: Path) -> str:
    try:
        directory = open_attempt(attempt)
        try:
            with os.fdopen(open_regular(MANIFEST, directory), "rb") as file:
                return parse(file.read(MAX_BYTES + 1), MANIFEST).parent
        finally:
            os.close(directory)
    except (OSError, JournalError):
        return ""


def wait_drained(agent: AgentHandle, parent: str, ended: float, seconds: float) -> bool:
    """Wait until the agent has delivered the ends of this parent's runs, for ``seconds`` at most; whether it has.

    An agent that then has nobody to follow is told to leave: it would wait for
    a first run for ever where the command recorded none.
    """
    runs = runs_of(agent.root, parent)

    def delivered() -> bool:
        if not agent.alive():
            return True
        drained = agent_document(agent.root).get("drained")
        times = [drained.get(run) for run in runs] if isinstance(drained, dict) else [None]
        return all(isinstance(at, int | float) and at >= ended for at in times)

    done = wait_patiently(delivered, seconds, time.monotonic)
    if agent.alive() and not runs and not any(is_locked(place.path / LOCK) for place in find_attempts(agent.root)):
        os.kill(agent.pid, signal.SIGTERM)
        wait_patiently(lambda: not agent.alive(), seconds, time.monotonic)
    return done
