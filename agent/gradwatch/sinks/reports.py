"""The report of each ended run, put on its MLflow run.

Drawing takes a second of work and a hundred megabytes, so ``gradwatch report``
does it, in a process of its own, one at a time and behind everybody else. The
page tells what the journal says; where one could not be made or delivered, the
same command makes it again. So nothing waits for a report but the end of an
agent, and that within its grace.
"""

from __future__ import annotations

import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from gradwatch.collect.model import Finding, LayerTable, RunEnd, RunFacts, Validation, Window

#: Seconds that one report may take.
SECONDS: Final = 120.0
#: Seconds for which a run is waited for that MLflow does not know yet.
PATIENCE: Final = 60.0
#: Reports that wait at most; of runs beyond, none is made.
MAX_WAITING: Final = 100

_log = logging.getLogger("gradwatch.agent")


class Reports:
    """A :class:`~gradwatch.collect.model.Sink` that only knows ends.

    ``root`` holds the journals; ``mlflow_run`` tells the MLflow run of a run,
    None while it is not known.
    """

    name = "reports"

    def __init__(self, root: Path, uri: str, mlflow_run: Callable[[str], str | None]) -> None:
        self._root, self._uri, self._mlflow_run = root, uri, mlflow_run
        self._waiting: queue.Queue[str | None] = queue.Queue(MAX_WAITING)
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        #: Reports that could not be made, or not be delivered.
        self.errors = 0
        self.dropped = 0

    def run_ended(
        self, facts: RunFacts, end: RunEnd, summary: Mapping[str, Any], last_steps: Mapping[str, Sequence[float]]
    ) -> None:
        if facts.manifest.rank != 0:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="gradwatch-reports", daemon=True)
            self._thread.start()
        try:
            self._waiting.put_nowait(facts.run)
        except queue.Full:
            self.dropped += 1
            _log.warning("report-dropped run=%s: %d wait already", facts.run, MAX_WAITING)

    def _work(self) -> None:
        while (run := self._waiting.get()) is not None:
            try:
                self._make(run)
            except Exception as error:
                self.errors += 1
                _log.warning("report-failed run=%s %s: %s", run, type(error).__name__, str(error)[:300])

    def _make(self, run: str) -> None:
        known = self._known(run)
        if known is None:
            raise LookupError("MLflow does not know it")
        command = [sys.executable, "-m", "gradwatch", "report", str(self._root / run)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # One may stand in the address, and what is an argument can be read by everybody on the machine.
        environment["MLFLOW_TRACKING_URI"] = self._uri
        self._process = subprocess.Popen(
            [*command, "--mlflow-run", known],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            os.setpriority(os.PRIO_PROCESS, self._process.pid, 10)
        except OSError:
            pass
        try:
            _, said = self._process.communicate(timeout=SECONDS)
        finally:
            if self._process.poll() is None:
                self._process.kill()
                self._process.wait()
        if self._process.returncode != 0:
            raise RuntimeError(said.decode(errors="replace").strip().splitlines()[-1] if said.strip() else "no word")
        _log.info("report run=%s", run)

    def _known(self, run: str) -> str | None:
        deadline = time.monotonic() + PATIENCE
        while (known := self._mlflow_run(run)) is None and time.monotonic() < deadline:
            if self._closing.wait(0.5):
                return self._mlflow_run(run)
        return known

    def pending(self) -> int:
        """Always 0: a report keeps no run from counting as delivered."""
        return 0

    def close(self, deadline: float) -> None:
        """Finish what waits until ``deadline``, then let go."""
        if self._thread is None:
            return
        self._closing.set()
        try:
            self._waiting.put_nowait(None)
        except queue.Full:
            pass
        self._thread.join(max(0.0, deadline - time.monotonic()))
        process = self._process
        if self._thread.is_alive() and process is not None and process.poll() is None:
            process.kill()

    # -- what a report is not made of

    def run_started(self, facts: RunFacts) -> None: ...

    def window(self, facts: RunFacts, window: Window) -> None: ...

    def validation(self, facts: RunFacts, validation: Validation) -> None: ...

    def finding(self, facts: RunFacts, finding: Finding) -> None: ...

    def layers(self, facts: RunFacts, table: LayerTable) -> None: ...

    def heartbeat(self, facts: RunFacts, state: str, step: int, time: float) -> None: ...
