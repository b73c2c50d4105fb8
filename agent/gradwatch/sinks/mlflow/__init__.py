"""The MLflow sink: windows, hyperparameters, findings and the true end of each run, in MLflow.

Two threads deliver: one talks to the tracking store, one uploads artifacts, so
that a failing artifact store never holds up metrics or a status. The caller only
queues, in memory and in a mirror on disk. ``docs/mlflow.md`` lists what goes
where.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from gradwatch.collect.model import Finding, LayerTable, RunEnd, RunFacts, Validation, Window
from gradwatch.sinks.mlflow import entities, outbox, tables
from gradwatch.sinks.mlflow.complaints import Complaints
from gradwatch.sinks.mlflow.courier import Courier, Pauses
from gradwatch.sinks.mlflow.outbox import Outbox, PendingEnd, Target
from gradwatch.sinks.mlflow.tracking import Tracking, scrub

__all__ = ["MlflowSink"]

logger = logging.getLogger("gradwatch.mlflow")

LAYERS: Final = "gradwatch/layers.json"
FINDINGS: Final = "gradwatch/findings.json"
HYPERPARAMETERS: Final = "gradwatch/hyperparameters.json"
#: Seconds from one version of ``gradwatch/layers.json`` to the next, while the run lives.
LAYERS_INTERVAL: Final = 60.0
#: Findings of a run in ``gradwatch/findings.json``: the first half and the newest half.
MAX_FINDINGS: Final = 1000
#: Largest artifact.
MAX_ARTIFACT: Final = 16 * 2**20


class MlflowSink:
    """A :class:`~gradwatch.collect.model.Sink` that keeps an MLflow run up to date for each run.

    Args:
        tracking_uri: the tracking server or store; None for ``MLFLOW_TRACKING_URI``. Without either, nothing
            is sent. An address in a journal is not followed: credentials of this process would go there.
        state_dir: where run ids and what waits are kept over a restart; made where missing, mode 0700.
        clock: monotonic seconds.
        max_backlog_bytes: memory for windows that wait, over all runs; what is beyond is thinned, oldest
            windows of the longest backlog first, and counted in ``dropped``.
        backoff: first and longest pause after a failure in seconds; each pause is drawn from the upper half
            of a doubling range. Where access is denied, the longest pause is the only one.
        denied_pause: pause in seconds where access is denied (expired credentials).
        verify_after: seconds after the end at which the status of a run that the trainer may set too is
            looked at again.

    Raises:
        OSError: ``state_dir`` cannot be made.
    """

    name = "mlflow"

    def __init__(
        self,
        tracking_uri: str | None,
        *,
        state_dir: Path,
        clock: Callable[[], float] = time.monotonic,
        max_backlog_bytes: int = 16 * 2**20,
        backoff: tuple[float, float] = (0.5, 30.0),
        denied_pause: float = 30.0,
        verify_after: tuple[float, ...] = (1.0, 3.0),
    ) -> None:
        self.tracking_uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        self._state = Path(state_dir) / "mlflow"
        self._clock = clock
        self._max_bytes = max_backlog_bytes
        self._complaints = Complaints(logger, clock)
        self._courier = Courier(
            Tracking(self.tracking_uri or ""), self._complaints, clock, Pauses(*backoff, denied_pause), verify_after
        )
        self._lock, self._boxes = self._courier.lock, self._courier.boxes
        if self.tracking_uri is None:
            self._courier.off = True
        else:
            self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._recover()

    # -- what the agent asks

    @property
    def errors(self) -> int:
        """Failed deliveries so far; each is tried again."""
        return self._complaints.errors

    @property
    def dropped(self) -> int:
        """Items given up so far: rejected by the server, or fallen out of the bounded backlog."""
        return self._complaints.lost

    def run_id(self, run: str) -> str | None:
        """The MLflow run of a run, once it is known; remembered over restarts."""
        with self._lock:
            box = self._boxes.get(run)
            if box is None and not self._courier.off:
                box = outbox.load(outbox.directory_of(self._state, run), 0)
            return box.target.run_id if box is not None else None

    def pending(self) -> int:
        with self._lock:
            return sum(box.waiting() for box in self._boxes.values())

    # -- facts

    def run_started(self, facts: RunFacts) -> None:
        with self._open(facts) as box:
            if box is not None:
                self._describe(box, facts)

    def window(self, facts: RunFacts, window: Window) -> None:
        with self._open(facts) as box:
            if box is not None and box.target.rank == 0:
                self._append(box, entities.window_rows(facts, window))

    def validation(self, facts: RunFacts, validation: Validation) -> None:
        with self._open(facts) as box:
            if box is not None and box.target.rank == 0:
                self._append(box, entities.validation_rows(validation))

    def finding(self, facts: RunFacts, finding: Finding) -> None:
        with self._open(facts) as box:
            if box is None:
                return
            if box.findings is None:
                box.findings = tables.parse_findings(box.read_artifact(FINDINGS))
            tables.add_finding(box.findings, finding, MAX_FINDINGS)
            key, value = entities.finding_tag(finding)
            box.tags[key] = value
            box.save()
            self._artifact(box, FINDINGS, tables.document(box.findings))

    def layers(self, facts: RunFacts, table: LayerTable) -> None:
        with self._open(facts) as box:
            if box is None or box.target.rank != 0:
                return
            if box.layers is None:
                box.layers = tables.LayerHistory.parse(box.read_artifact(LAYERS))
            box.layers.add(table)
            box.layers_changed = True
            if self._clock() >= box.layers_written + LAYERS_INTERVAL:
                self._write_layers(box)

    def heartbeat(self, facts: RunFacts, state: str, step: int, time: float) -> None:
        with self._open(facts) as box:
            if box is None or box.target.rank != 0 or facts.attempt < box.target.attempt:
                return
            if box.end is None and box.target.told < facts.attempt:
                box.tags |= entities.heartbeat_tags(state, step, time)

    def run_ended(
        self,
        facts: RunFacts,
        end: RunEnd,
        summary: Mapping[str, Any],
        last_steps: Mapping[str, Sequence[float]],
    ) -> None:
        with self._open(facts) as box:
            if box is None:
                return
            first = box.target.rank == 0
            self._write_layers(box)
            whole = tables.document({**summary, "end": asdict(end), "attempt": facts.attempt})
            steps = tables.table(last_steps)
            for folder in entities.end_folders(end, facts.attempt, box.target.rank):
                self._artifact(box, f"{folder}/summary.json", whole)
                self._artifact(box, f"{folder}/last_steps.json", steps)
            if first and box.target.hint is None:
                self._artifact(box, "summary.json", whole)
            box.artifacts = dict.fromkeys(box.artifacts, 0.0)
            if not first or facts.attempt < box.target.attempt:
                return
            for key in entities.heartbeat_tags("", 0, 0.0):
                box.tags.pop(key, None)
            status, evidence = entities.status_of(end), entities.is_evidence(end)
            box.end = PendingEnd(facts.attempt, status, end.time, evidence, entities.end_tags(end))
            box.save()

    def close(self, deadline: float) -> None:
        with self._lock:
            for box in self._boxes.values():
                self._write_layers(box)
        self._courier.drain(deadline)
        left = self.pending()
        if left:
            logger.warning("mlflow: %d items not delivered in time; they wait in %s", left, self._state)

    # -- queueing

    @contextmanager
    def _open(self, facts: RunFacts) -> Iterator[Outbox | None]:
        """A run's outbox under the lock; None where nothing can be delivered."""
        with self._lock:
            if self._courier.off:
                if self.tracking_uri is not None:
                    self._complaints.dropped(1, "")
                yield None
                return
            box = self._boxes.get(facts.run) or self._new(facts)
            if facts.attempt > box.target.attempt or _hint(facts) != box.target.hint:
                self._describe(box, facts)
            if box.target.gone:
                self._complaints.dropped(1, "")
            yield None if box.target.gone else box
            self._note_disk(box)
            self._courier.wake()

    def _new(self, facts: RunFacts) -> Outbox:
        directory = outbox.directory_of(self._state, facts.run)
        box = outbox.load(directory, self._max_bytes)
        if box is None:
            box = Outbox(directory, Target(facts.run, facts.model, attempt=-1))
        self._boxes[facts.run] = box
        box.make_directory()
        return box

    def _note_disk(self, box: Outbox) -> None:
        if box.disk_error:
            self._complaints.failed(f"cannot keep state in {self._state}: {box.disk_error}", box.waiting())
            box.disk_error = ""

    def _describe(self, box: Outbox, facts: RunFacts) -> None:
        """Take over who the run is, where that changed."""
        target, manifest = box.target, facts.manifest
        if facts.attempt < target.attempt:
            return
        hint = _hint(facts)
        owned = bool(hint and manifest.mlflow.get("experiment"))
        changed = (facts.attempt, hint, owned) != (target.attempt, target.hint, target.owned)
        if hint is not None and hint != target.hint:
            target.gone, box.given = False, {}
        if facts.attempt > target.attempt:
            box.end, box.told_at = None, None
        target.attempt, target.hint, target.owned, target.rank = facts.attempt, hint, owned, manifest.rank
        target.model, target.run_name, target.start_time = facts.model, facts.run_name, facts.start_time
        params = entities.parameters(facts.hyperparameters)
        fresh = {key: value for key, value in params.items() if box.given.get(key) != value}
        if manifest.rank == 0 and (fresh or changed):
            box.params |= fresh
            box.given = params
            box.tags |= entities.identity_tags(facts)
            self._artifact(box, HYPERPARAMETERS, tables.document(dict(facts.hyperparameters)))
        if fresh or changed:
            box.resolved = box.resolved and not changed
            box.save()

    def _append(self, box: Outbox, rows: entities.Rows) -> None:
        if not rows.keys:
            return
        box.append(rows)
        while sum(other.size for other in self._boxes.values()) > self._max_bytes:
            longest = max(self._boxes.values(), key=lambda other: other.size)
            self._complaints.dropped(longest.thin(), "the backlog is full: every second of the oldest windows went")

    def _write_layers(self, box: Outbox) -> None:
        if box.layers is not None and box.layers_changed:
            box.layers_changed, box.layers_written = False, self._clock()
            self._artifact(box, LAYERS, box.layers.render())

    def _artifact(self, box: Outbox, path: str, text: str) -> None:
        """Keep an artifact on disk and queue it."""
        if len(text) > MAX_ARTIFACT:
            self._complaints.dropped(1, f"artifact {path} is larger than {MAX_ARTIFACT >> 20} MiB")
            return
        try:
            box.write_artifact(path, text)
        except OSError as error:
            self._complaints.dropped(1, f"artifact {path} cannot be kept in {self._state}: {scrub(error)}")
            return
        box.artifacts.setdefault(path, 0.0)

    def _recover(self) -> None:
        """Take up what an agent before this one could not deliver."""
        for directory in sorted(self._state.iterdir())[:10_000]:
            box = outbox.load(directory, self._max_bytes)
            if box is not None and not box.target.gone and (box.rows or box.end is not None):
                self._boxes[box.target.run] = box
        if self._boxes:
            logger.info("mlflow: %d runs have items that wait from before", len(self._boxes))
            with self._lock:
                self._courier.wake()

    # -- delivering


def _hint(facts: RunFacts) -> str | None:
    """The MLflow run that the trainer named."""
    return facts.manifest.mlflow.get("run_id") or None
