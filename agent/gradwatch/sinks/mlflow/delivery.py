"""Delivering one run's outbox: find its MLflow run, then parameters, tags, metrics, and last the end.

Every part can be tried again: parameters that are there already are not sent,
tags replace themselves, and MLflow's store knows a metric by (run, key,
timestamp, step, value), so that a row that is sent twice is one row.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from gradwatch.sinks.mlflow.entities import (
    PARAM_LENGTHS,
    PREFIX,
    Metric,
    chunks,
    cut,
    next_status,
    tag_text,
)
from gradwatch.sinks.mlflow.outbox import Outbox, PendingEnd
from gradwatch.sinks.mlflow.tracking import RUN_TAG, Kind, RunView, Tracking, TrackingError

MAX_METRICS: Final = 1000
MAX_PARAMS: Final = 100
MAX_TAGS: Final = 100
#: Calls for metrics in one pass, so that one run's backlog does not hold up the others.
_CALLS: Final = 10
#: Refusals of a key after which it is not sent any more.
_REFUSALS: Final = 3
#: Seconds that the status of an ended run waits for the artifacts, so that who sees the end finds them.
ARTIFACT_GRACE: Final = 2.0
STATUS_BY: Final = f"{PREFIX}status_by"
#: MLflow's own tag: `mlflow.load_table` reads only what is listed there.
TABLES_TAG: Final = "mlflow.loggedArtifacts"
TABLES: Final = ("gradwatch/layers.json", "gradwatch/last_steps.json")
_TERMINAL: Final = ("FINISHED", "FAILED", "KILLED")
_END_TAGS: Final = tuple(PREFIX + name for name in ("reason", "exception", "exit_code", "signal"))


class Ledger(Protocol):
    """Where a delivery says what happened."""

    def say(self, text: str) -> None: ...

    def dropped(self, count: int, why: str) -> None: ...


class Delivery:
    """One pass over an outbox (:meth:`deliver`). ``lock`` guards outboxes and is never held during a call."""

    def __init__(
        self,
        tracking: Tracking,
        lock: threading.Condition,
        clock: Callable[[], float],
        ledger: Ledger,
        verify_after: tuple[float, ...],
    ) -> None:
        self._tracking = tracking
        self._lock = lock
        self._clock = clock
        self._ledger = ledger
        self._verify_after = verify_after

    def deliver(self, box: Outbox) -> None:
        """Send what waits, as far as it goes. Raises ``TrackingError``; what was sent by then is sent."""
        if not box.resolved:
            self._resolve(box)
        if box.target.run_id is None:
            return
        self._send_params(box, box.target.run_id)
        self._send_tags(box, box.target.run_id)
        self._send_metrics(box, box.target.run_id)
        if box.end is not None and not box.rows and not box.under_way:
            self._tell_end(box, box.end, box.target.run_id)

    # -- which run

    def _resolve(self, box: Outbox) -> None:
        target = box.target
        view = self._named(box) or self._tagged(box)
        if view is None:
            if target.rank != 0:
                raise TrackingError(Kind.RETRY, f"no MLflow run of {target.run} yet; rank 0's agent makes it")
            view = self._create(box)
        if view.deleted:
            raise TrackingError(Kind.GONE, f"run {view.run_id} was deleted")
        if target.created and target.run_id not in (None, view.run_id):
            self._leave(str(target.run_id), view.run_id)
        if target.rank == 0:
            self._reopen(box, view)
        with self._lock:
            target.created = target.created and target.run_id in (None, view.run_id)
            target.run_id = view.run_id
            box.resolved = True
            box.save()

    def _named(self, box: Outbox) -> RunView | None:
        """The run that the trainer named, else the environment, else the one used before."""
        target = box.target
        if target.hint is not None:
            view = self._tracking.find_run(target.hint)
            if view is not None:
                return view
            self._ledger.say(f"run {target.hint}, named by the trainer of {target.run}, is not on this server")
        elsewhere = os.environ.get("MLFLOW_RUN_ID", "").strip()
        if elsewhere and elsewhere != target.hint:
            view = self._tracking.find_run(elsewhere)
            if view is not None and view.tags.get(RUN_TAG, target.run) == target.run:
                return view
        return self._tracking.get_run(target.run_id) if target.run_id is not None else None

    def _tagged(self, box: Outbox) -> RunView | None:
        """A run of an earlier attempt, of which an agent that lost its state knows nothing."""
        experiment = self._tracking.experiment_id(box.target.model, create=False)
        return self._tracking.search_run(experiment, box.target.run) if experiment is not None else None

    def _create(self, box: Outbox) -> RunView:
        target = box.target
        experiment = self._tracking.experiment_id(target.model, create=True)
        tags = {key: value for key, value in box.tags.items() if key.startswith(PREFIX)}
        tags |= {RUN_TAG: target.run, f"{PREFIX}created": "true"}
        if f"{PREFIX}commit" in tags:
            tags["mlflow.source.git.commit"] = tags[f"{PREFIX}commit"]
        view = self._tracking.create_run(str(experiment), target.run_name, tags, target.start_time)
        target.run_id, target.created = view.run_id, True
        return view

    def _leave(self, old: str, new: str) -> None:
        """The trainer opened a run of its own after we had made one: end ours, and say where it goes on."""
        try:
            self._tracking.set_tags(old, {f"{PREFIX}continued_in": new})
            self._tracking.set_terminated(old, "FINISHED", None)
        except TrackingError as error:
            if error.kind not in (Kind.GONE, Kind.REJECTED):
                raise

    def _reopen(self, box: Outbox, view: RunView) -> None:
        """A new attempt of a run whose end we had told: it runs again."""
        target = box.target
        if view.tags.get(f"{PREFIX}created") == "true" and view.tags.get(RUN_TAG) == target.run:
            target.created, target.run_id = True, view.run_id
        earlier = view.tags.get(f"{PREFIX}attempt", "")
        if not earlier.isdigit() or int(earlier) >= target.attempt:
            return
        if view.status in _TERMINAL and view.tags.get(STATUS_BY):
            self._tracking.set_running(view.run_id)
        stale = {key: "" for key in (STATUS_BY, *_END_TAGS) if view.tags.get(key)}
        if stale:
            self._tracking.set_tags(view.run_id, stale)

    # -- parameters

    def _send_params(self, box: Outbox, run_id: str) -> None:
        with self._lock:
            waiting = dict(box.params)
        if not waiting:
            return
        there = self._tracking.get_run(run_id).params
        other = sorted(key for key, value in waiting.items() if key in there and not _same(there[key], value))
        if other:
            self._ledger.say(f"{box.target.run}: parameters logged before with another value stay: {', '.join(other)}")
            with self._lock:
                box.tags[f"{PREFIX}params_conflicting"] = tag_text(", ".join(other))
        fresh = [(key, value) for key, value in waiting.items() if key not in there]
        parts = chunks(fresh, MAX_PARAMS)
        while parts:
            try:
                self._tracking.log_params(run_id, dict(parts[0]))
            except TrackingError as error:
                self._check_rejected(error, run_id)
                parts[:1] = self._smaller_params(parts[0], error)
            else:
                parts.pop(0)
        with self._lock:
            for key, value in waiting.items():
                if box.params.get(key) == value:
                    del box.params[key]

    def _smaller_params(self, part: list[tuple[str, str]], error: TrackingError) -> list[list[tuple[str, str]]]:
        """Halves of a rejected part; of a single one a shorter value, for servers with another limit."""
        if len(part) > 1:
            return _halves(part)
        key, value = part[0]
        shorter = [limit for limit in PARAM_LENGTHS if limit < len(value)]
        if shorter:
            return [[(key, cut(value, shorter[0]))]]
        self._ledger.dropped(1, f"parameter {key} was rejected: {error}")
        return []

    # -- tags

    def _send_tags(self, box: Outbox, run_id: str) -> None:
        with self._lock:
            waiting = dict(box.tags)
        self._set_tags(run_id, waiting)
        with self._lock:
            for key, value in waiting.items():
                if box.tags.get(key) == value:
                    del box.tags[key]

    def _set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        parts = chunks(tags.items(), MAX_TAGS)
        while parts:
            try:
                self._tracking.set_tags(run_id, dict(parts[0]))
            except TrackingError as error:
                self._check_rejected(error, run_id)
                if len(parts[0]) == 1:
                    self._ledger.dropped(1, f"tag {parts[0][0][0]} was rejected: {error}")
                parts[:1] = _halves(parts[0])
            else:
                parts.pop(0)

    # -- metrics

    def _send_metrics(self, box: Outbox, run_id: str) -> None:
        """Batches of whole windows; of a rejected batch all but what is bad, found by halving.

        What is left of a batch is kept between passes, so that halving makes
        progress on a server that also fails half its calls.
        """
        for _ in range(_CALLS):
            if not box.parts and not self._take(box):
                return
            part = box.parts[0]
            try:
                self._tracking.log_metrics(run_id, part)
            except TrackingError as error:
                self._check_rejected(error, run_id)
                if len(part) == 1:
                    self._refuse(box, part[0], error)
                box.parts[:1] = _halves(part)
            else:
                box.parts.pop(0)
            if not box.parts:
                with self._lock:
                    box.arrived()

    def _take(self, box: Outbox) -> bool:
        """Take the next windows under way; whether there were any."""
        with self._lock:
            box.take(MAX_METRICS)
        metrics = [metric for rows in box.under_way for metric in rows.metrics()]
        good = [metric for metric in metrics if box.refused.get(metric[0], 0) < _REFUSALS]
        if len(good) < len(metrics):
            self._ledger.dropped(len(metrics) - len(good), "their keys were rejected before")
        box.parts = chunks(good, MAX_METRICS)
        if box.under_way and not box.parts:
            with self._lock:
                box.arrived()
        return bool(box.parts)

    def _refuse(self, box: Outbox, metric: Metric, error: TrackingError) -> None:
        if len(box.refused) < 1000:
            box.refused[metric[0]] = box.refused.get(metric[0], 0) + 1
        self._ledger.dropped(1, f"metric {metric[0]} at step {metric[3]} was rejected: {error}")

    def _check_rejected(self, error: TrackingError, run_id: str) -> None:
        """Pass on all but rejections; a deleted run rejects everything."""
        if error.kind is not Kind.REJECTED:
            raise error
        if self._tracking.get_run(run_id).deleted:
            raise TrackingError(Kind.GONE, f"run {run_id} was deleted")

    # -- the end

    def _tell_end(self, box: Outbox, end: PendingEnd, run_id: str) -> None:
        """Set the status once all else is there; look again where somebody else may set it too."""
        now = self._clock()
        if end.since is None:
            end.since = now
        if end.looks == 0:
            if box.artifacts and now < end.since + ARTIFACT_GRACE:
                return
            self._set_tags(run_id, end.tags)
        elif now < end.since + self._verify_after[end.looks - 1]:
            return
        last = box.target.created or end.looks >= len(self._verify_after)
        view = self._tracking.get_run(run_id)
        if view.deleted:
            raise TrackingError(Kind.GONE, f"run {run_id} was deleted")
        if end.looks == 0:
            self._set_tags(run_id, list_tables(view.tags.get(TABLES_TAG)))
        wanted = next_status(view.status, end.status, evidence=end.evidence)
        if box.target.owned and wanted == "FINISHED" and not last:
            wanted = None  # the trainer ends it by itself, now
        elif wanted is not None:
            self._tracking.set_tags(run_id, {STATUS_BY: str(end.attempt)})
            self._tracking.set_terminated(run_id, wanted, end.time)
        elif not end.evidence and view.status in _TERMINAL:
            last = True
        end.looks += 1
        if last:
            with self._lock:
                if box.end is end:
                    box.end = None
                    box.target.told = end.attempt
                    box.save()

    def end_due(self, box: Outbox) -> float:
        """Monotonic time at which the end is to be looked at."""
        end = box.end
        if end is None or end.since is None or box.rows or box.under_way:
            return 0.0
        if end.looks == 0:
            return end.since + ARTIFACT_GRACE if box.artifacts else 0.0
        return end.since + self._verify_after[min(end.looks, len(self._verify_after)) - 1]


def list_tables(there: str | None) -> dict[str, str]:
    """The tag by which MLflow knows which artifacts are tables, ours added to what the trainer listed."""
    try:
        listed = json.loads(there or "[]")
    except ValueError:
        return {}
    if not isinstance(listed, list):
        return {}
    ours = [{"path": path, "type": "table"} for path in TABLES]
    return {TABLES_TAG: json.dumps(listed + [entry for entry in ours if entry not in listed])}


def _same(there: str, ours: str) -> bool:
    """Whether a value is the one that stands there, cut by us or by the server or whole."""
    if there == ours:
        return True
    return len(there) < len(ours) and there in (ours[: len(there)], cut(ours, len(there)))


def _halves(part: list[tuple[str, str]] | list[Metric]) -> list[list]:  # type: ignore[type-arg]
    """Two halves of a rejected part; nothing of a single one."""
    middle = len(part) // 2
    return [list(part[:middle]), list(part[middle:])] if middle else []
