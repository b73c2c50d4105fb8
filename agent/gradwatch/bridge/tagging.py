"""Writing alerts to MLflow: tags of the run, an artifact an alert, tags of the model's version.

All of it can be done again without harm: tags are merged by what they say
(:mod:`alerts`), artifacts of one alert are the same bytes. So a post that is
told twice, or half done before an outage, is told right in the end.
"""

from __future__ import annotations

import logging
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

from gradwatch.bridge.alerts import Alert, Life, life_of, read_tag, write_tag
from gradwatch.bridge.poll import RunsPoll
from gradwatch.bridge.records import RunRecord, record_of
from gradwatch.bridge.versions import VersionsPoll
from gradwatch.sinks.mlflow.history import History, quote
from gradwatch.sinks.mlflow.tracking import Kind, TrackingError

_log = logging.getLogger("gradwatch.bridge")

#: What became of an alert. ``failed`` asks for another try, all else is final.
Result = Literal["applied", "unchanged", "unknown", "refused", "failed"]

#: Calls to MLflow at once: a call mostly waits for the database to write; its client keeps ten connections.
WORKERS: Final = 10
#: Alerts whose last word is remembered, so that repetitions cost no call.
MAX_DONE: Final = 50_000
#: Seconds for which a run that is not in MLflow is not looked for again.
UNKNOWN_SECONDS: Final = 30.0
#: Seconds for which the list of experiments is good enough to search in.
EXPERIMENTS_SECONDS: Final = 5.0
_CHUNK: Final = 100

#: Where an alert belongs: an MLflow run, or a version of a model.
Target = tuple[Literal["run"], str] | tuple[Literal["version"], str, str]


@dataclass(slots=True)
class _Work:
    """The alerts of one target in one batch, by their place in the batch."""

    alerts: dict[int, Alert] = field(default_factory=dict)


class Tagger:
    """Applies batches of alerts; one batch at a time.

    Args:
        history: the server.
        runs, versions: what the polls know, so that most alerts need no search.
        annotate: called for each alert that was applied, with the run where there is one.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        history: History,
        runs: RunsPoll,
        versions: VersionsPoll,
        annotate: Callable[[Alert], None] = lambda alert: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._history, self._runs, self._versions = history, runs, versions
        self._annotate = annotate
        self._clock = clock
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="gradwatch-tag")
        self._done: OrderedDict[tuple[str, int], bool] = OrderedDict()
        self._unknown: dict[str, float] = {}
        self._experiments: list[str] = []
        self._experiments_at = -math.inf

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def apply(self, alerts: Sequence[Alert]) -> list[Result]:
        """Write a batch; what became of each. Never raises for MLflow's sake."""
        results: list[Result] = ["failed"] * len(alerts)
        try:
            work = self._sort(alerts, results)
            entities = self._read([target[1] for target in work if target[0] == "run"])
            jobs = {
                target: self._pool.submit(self._write, target, part.alerts, entities.get(target[1]))
                for target, part in work.items()
            }
            for job in jobs.values():
                for index, result in job.result().items():
                    results[index] = result
        except TrackingError as error:
            _log.warning("alerts-failed count=%d error=%s", len(alerts), error)
        for alert, result in zip(alerts, results, strict=True):
            if result in ("applied", "unchanged"):
                self._remember(alert)
            if result == "applied":
                self._annotate(alert)
        return results

    # -- where they belong

    def _sort(self, alerts: Sequence[Alert], results: list[Result]) -> dict[Target, _Work]:
        new = [index for index, alert in enumerate(alerts) if not self._is_done(alert)]
        run_ids = self._run_ids({alerts[index].labels.get("run", "") for index in new} - {""})
        work: dict[Target, _Work] = {}
        results[:] = ["unchanged"] * len(alerts)
        for index in new:
            target = self._target(alerts[index], run_ids)
            results[index] = "failed" if target is not None else "unknown"
            if target is not None:
                work.setdefault(target, _Work()).alerts[index] = alerts[index]
        return work

    def _target(self, alert: Alert, run_ids: Mapping[str, str]) -> Target | None:
        run = alert.labels.get("run", "")
        if run:
            return ("run", run_ids[run]) if run in run_ids else None
        model = self._versions.models.get(alert.labels.get("model", ""))
        if model is None or model.current is None:
            return None
        version = alert.labels.get("version", model.current.version)
        return ("version", model.name, version) if version.isdecimal() else None

    def _run_ids(self, runs: Iterable[str]) -> dict[str, str]:
        """MLflow's ids of runs: known from the poll, else searched for, also in experiments made just now."""
        now = self._clock()
        found: dict[str, str] = {}
        sought: list[str] = []
        for run in runs:
            record = self._runs.runs.find(run)
            if record is not None:
                found[run] = record.run_id
            elif now >= self._unknown.get(run, -math.inf) + UNKNOWN_SECONDS:
                sought.append(run)
        if not sought:
            return found
        if now >= self._experiments_at + EXPERIMENTS_SECONDS:
            self._experiments, self._experiments_at = self._history.experiments(), now
        if len(self._unknown) >= MAX_DONE:
            self._unknown.clear()
        search = partial(self._history.run_named, self._experiments)
        for run, entity in zip(sought, self._pool.map(search, sought), strict=True):
            if entity is None:
                self._unknown[run] = now
            else:
                found[run] = str(entity.info.run_id)
        return found

    def _read(self, run_ids: Sequence[str]) -> dict[str, Any]:
        """The runs as they stand, a call for each hundred."""
        experiments = list(dict.fromkeys([*self._runs.experiments, *self._experiments]))
        found: dict[str, Any] = {}
        for start in range(0, len(run_ids), _CHUNK):
            chunk = run_ids[start : start + _CHUNK]
            found |= {str(run.info.run_id): run for run in self._history.runs_by_id(experiments, chunk)}
        return found

    # -- writing

    def _write(self, target: Target, alerts: Mapping[int, Alert], entity: Any | None) -> dict[int, Result]:
        """Everything about one target; an alert whose artifact fails is told again with all of it."""
        try:
            if target[0] == "version":
                changed = self._tag_version(target[1], target[2], alerts.values())
                return dict.fromkeys(alerts, "applied" if changed else "unchanged")
            if entity is None:
                return dict.fromkeys(alerts, "unknown")
            return self._write_run(target[1], alerts, entity)
        except TrackingError as error:
            final: dict[Kind, Result] = {Kind.GONE: "unknown", Kind.REJECTED: "refused"}
            result = final.get(error.kind, "failed")
            _log.warning("alert-failed target=%s result=%s error=%s", "/".join(target[1:]), result, error)
            return dict.fromkeys(alerts, result)

    def _write_run(self, run_id: str, alerts: Mapping[int, Alert], entity: Any) -> dict[int, Result]:
        record = record_of(entity)
        before = {alert.tag: read_tag(entity.data.tags.get(alert.tag, "")) for alert in alerts.values()}
        tags = merged(before, alerts.values(), record.step)
        if tags:
            self._history.set_tags(run_id, tags)
        for alert in last_words(alerts.values()):
            life = before[alert.tag].get(alert.fingerprint)
            if life is None or self._tells_more(run_id, alert, life):
                self._history.put_text(run_id, alert.artifact, alert.document())
        for model, version in self._versions.of_run.get(run_id, ()):
            self._tag_version(model, version, alerts.values(), record)
        return {index: "applied" if alert.tag in tags else "unchanged" for index, alert in alerts.items()}

    def _tells_more(self, run_id: str, alert: Alert, life: Life) -> bool:
        """Whether an artifact is to be written although the tag knew the alert's fingerprint."""
        if not alert.firing or alert.starts > life.starts:
            return True
        if alert.starts == life.starts:
            return life.firing
        # A late first word of a life before the newest: what stands there may be its last word.
        return alert.artifact not in self._history.artifacts(run_id, "alerts")

    def _tag_version(self, model: str, version: str, alerts: Any, record: RunRecord | None = None) -> bool:
        name = quote(model)
        found = self._history.versions(f"name = {name} AND version_number = {version}", 1) if name else []
        if not found:
            return False
        before = {alert.tag: read_tag(found[0].tags.get(alert.tag, "")) for alert in alerts}
        tags = merged(before, alerts, record.step if record is not None else -1)
        self._history.tag_version(model, version, tags)
        return bool(tags)

    # -- what was told before

    def _is_done(self, alert: Alert) -> bool:
        known = self._done.get(alert.key)
        return known is not None and (not known or alert.firing)

    def _remember(self, alert: Alert) -> None:
        """Keep the last word; of one alert, resolved is the last."""
        self._done[alert.key] = alert.firing and self._done.get(alert.key, True)
        self._done.move_to_end(alert.key)
        while len(self._done) > MAX_DONE:
            self._done.popitem(last=False)


def merged(before: Mapping[str, Mapping[str, Life]], alerts: Any, step: int) -> dict[str, str]:
    """The tags that alerts change, by key: what stood there, and what they add."""
    lives = {key: dict(known) for key, known in before.items()}
    for alert in alerts:
        known = lives[alert.tag]
        life = known.get(alert.fingerprint)
        known[alert.fingerprint] = life_of(alert, step) if life is None else life.told_by(alert, step)
    return {key: write_tag(known) for key, known in lives.items() if write_tag(known) != write_tag(before[key])}


def last_words(alerts: Any) -> list[Alert]:
    """Of each alert in a batch that was told, the word that stands in the end."""
    last: dict[tuple[str, int], Alert] = {}
    for alert in alerts:
        if not alert.inferred and (alert.key not in last or not alert.firing):
            last[alert.key] = alert
    return list(last.values())
