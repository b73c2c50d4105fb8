"""The bridge as a whole: a thread that polls, the desk that writes alerts, and whether both are well."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Final

from gradwatch.bridge.alerts import Alert
from gradwatch.bridge.annotations import Annotations
from gradwatch.bridge.desk import Desk
from gradwatch.bridge.exposition import BridgeExposition, Counts, history_page
from gradwatch.bridge.ghosts import Mode, Reachable, Reaper, live_series
from gradwatch.bridge.poll import RunsPoll
from gradwatch.bridge.reconcile import Reconciler, active_alerts
from gradwatch.bridge.tagging import Result, Tagger
from gradwatch.bridge.versions import DEFAULT_ALIASES, VersionsPoll
from gradwatch.sinks.mlflow.history import History
from gradwatch.sinks.mlflow.tracking import TrackingError

_log = logging.getLogger("gradwatch.bridge")

#: Seconds between two comparisons with what Alertmanager holds, where nothing went wrong in between.
RECONCILE_SECONDS: Final = 300.0
#: The part of a poll's time that runs may take, the rest is for versions.
RUNS_SHARE: Final = 0.7
#: Seconds without a sign of the poll's thread after which it counts as hung.
HUNG_SECONDS: Final = 600.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How the bridge runs; addresses that are None switch off what needs them."""

    tracking_uri: str
    #: Seconds between the starts of two polls, and those after which a poll begins no further page.
    interval: float = 30.0
    poll_budget: float = 10.0
    look_back_days: float = 30.0
    aliases: Sequence[str] = DEFAULT_ALIASES
    webhook_token: str | None = None
    max_body_bytes: int = 32 * 2**20
    alertmanager: str | None = None
    grafana: str | None = None
    grafana_token: str = ""
    prometheus: str | None = None
    reap: Mode = "off"
    #: Seconds for requests under way when told to stop.
    grace: float = 20.0


class Bridge:
    """Everything but HTTP. ``wall`` is Unix time, ``clock`` monotonic seconds."""

    def __init__(
        self,
        settings: Settings,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.settings = settings
        self._wall, self._clock = wall, clock
        self.history = History(settings.tracking_uri)
        self.runs = RunsPoll(self.history, settings.look_back_days * 86_400, wall)
        self.versions = VersionsPoll(self.history, settings.aliases, clock)
        self.annotations = Annotations(settings.grafana, settings.grafana_token) if settings.grafana else None
        annotate = self.annotations.put if self.annotations is not None else _nowhere
        self.tagger = Tagger(self.history, self.runs, self.versions, annotate, clock)
        self.desk = Desk(self.tagger, self._written, clock)
        live = live_series(settings.prometheus) if settings.prometheus else None
        self.reaper = Reaper(self.history, settings.reap, live, wall=wall)
        self.reconciler = Reconciler(wall)
        self.webhooks: Counter[str] = Counter()
        self.exposition = BridgeExposition(self._counts)
        #: Why MLflow cannot be read; "" while it can.
        self.trouble = "MLflow was not read yet"
        self._reachable = Reachable()
        self._reconcile_due = True
        self._reconciled_at = -RECONCILE_SECONDS
        self._alive_at = clock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gradwatch-poll", daemon=True)

    # -- life

    def start(self) -> None:
        self._thread.start()
        self.desk.start()
        if self.annotations is not None:
            self.annotations.start()

    def stop(self) -> None:
        """Let the batch and the poll under way end; what is not written, Alertmanager tells again."""
        self._stopping.set()
        deadline = self._clock() + self.settings.grace
        self.desk.stop(max(0.0, deadline - self._clock()))
        if self.annotations is not None:
            self.annotations.stop(max(0.0, deadline - self._clock()))
        self.tagger.close()
        if self._thread.is_alive():
            self._thread.join(max(0.0, deadline - self._clock()))

    @property
    def healthy(self) -> bool:
        """Whether the poll's thread gives signs of life."""
        return self._clock() - self._alive_at < HUNG_SECONDS

    @property
    def ready(self) -> bool:
        """Whether MLflow could be read at the last try."""
        return not self.trouble

    def submit(self, alerts: Sequence[Alert]) -> Future[Counter[Result]] | None:
        """Have alerts written; None where MLflow is known to be away, or too many wait."""
        if not self.ready:
            self._reconcile_due = True
            return None
        return self.desk.submit(alerts)

    # -- polling

    def _run(self) -> None:
        while not self._stopping.is_set():
            began = self._clock()
            self.poll()
            self._stopping.wait(max(1.0, began + self.settings.interval - self._clock()))

    def poll(self) -> None:
        """One poll of MLflow, what follows from it, and a comparison with Alertmanager where one is due."""
        began = self._alive_at = self._clock()
        try:
            # The first round over the look-back takes many polls; versions do not wait for it.
            self.runs.poll(self._until(began + RUNS_SHARE * self.settings.poll_budget))
            self.versions.poll(self._until(began + self.settings.poll_budget))
            self._reachable.good(self._wall())
            self.reaper.look(self.runs.runs.running.values(), self._reachable.seconds(self._wall()))
            self.reaper.reopen(self.runs.experiments)
        except TrackingError as error:
            self._went_wrong(str(error))
            return
        except Exception as error:
            _log.exception("poll-failed")
            self._went_wrong(f"{type(error).__name__}: {error}")
            return
        finally:
            self._alive_at = self._clock()
        if self.trouble:
            _log.info("mlflow-read uri=%s", "again" if self.exposition.polled_at else "first time")
        self.trouble = ""
        self.exposition.show(history_page(self.runs.runs, self.versions.models, self._wall()))
        self.exposition.polled_at, self.exposition.poll_seconds = self._wall(), self._clock() - began
        self._reconcile()

    def _until(self, deadline: float) -> Callable[[], bool]:
        """Whether there is time left, asked before each page; the asking is the thread's sign of life."""

        def in_time() -> bool:
            self._alive_at = self._clock()
            return self._alive_at < deadline and not self._stopping.is_set()

        return in_time

    def _went_wrong(self, text: str) -> None:
        if not self.trouble or self.exposition.polled_at is None:
            _log.warning("mlflow-unreachable %s", text)
        self.trouble = text or "MLflow cannot be read"
        self._reconcile_due = True

    # -- alerts

    def _written(self, good: bool) -> None:
        if not good:
            self._reconcile_due = True

    def _reconcile(self) -> None:
        """Write what Alertmanager holds and MLflow may not have."""
        now = self._clock()
        if self.settings.alertmanager is None or not (
            self._reconcile_due or now >= self._reconciled_at + RECONCILE_SECONDS
        ):
            return
        try:
            active = active_alerts(self.settings.alertmanager)
        except (OSError, ValueError) as error:
            _log.warning("reconcile-failed alertmanager=%s error=%s", self.settings.alertmanager, error)
            return
        runs = self.runs.runs
        gone = self.reconciler.outdated([*runs.running.values(), *runs.ended.values()], active)
        promise = self.desk.submit([*active, *gone])
        self._reconcile_due = promise is None
        self._reconciled_at = now

    def _counts(self) -> Counts:
        annotations = self.annotations.counts if self.annotations is not None else Counter[str]()
        return Counts(self.webhooks, annotations, self.reaper.reaped)


def _nowhere(alert: Alert) -> None:
    """Grafana is not set up."""
