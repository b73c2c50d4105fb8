"""What the bridge knows as Prometheus reads it: the catalogue's metrics of scope ``bridge``."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from gradwatch.bridge.ghosts import is_ghost
from gradwatch.bridge.poll import Newest, Runs
from gradwatch.bridge.records import RunRecord
from gradwatch.bridge.versions import Model, Version, drift
from gradwatch.catalog import END_STATES, RUN_STATES
from gradwatch.sinks.prometheus import Page

#: A model's last ended runs, of which the bad ones are counted.
RECENT_RUNS: Final = 5
#: Runs at RUNNING that get series of their own; newest first.
MAX_RUNS: Final = 2000
#: Series of hyperparameters, scores and gaps of one version, each.
MAX_NAMES: Final = 60
WEBHOOK_RESULTS: Final = ("accepted", "failed", "refused")
ANNOTATION_RESULTS: Final = ("written", "failed")


@dataclass(slots=True)
class Counts:
    """What the bridge did since it started."""

    webhooks: Counter[str] = field(default_factory=Counter)
    annotations: Counter[str] = field(default_factory=Counter)
    reaped: int = 0


def history_page(runs: Runs, models: Mapping[str, Model], now: float) -> Page:
    """Everything that a poll has read; counts over ended runs only once the look-back was read whole."""
    page = Page()
    _running(page, sorted(runs.running.values(), key=lambda record: -record.start), now)
    if runs.complete:
        _retrains(page, runs.ended.values())
    for model in models.values():
        _model(page, model, runs.newest)
    return page


def _running(page: Page, records: Sequence[RunRecord], now: float) -> None:
    page.put("bridge_ghost_runs", [], sum(is_ghost(record, now) for record in records))
    beating = [record for record in records if record.is_ours and record.heartbeat]
    for record in beating[:MAX_RUNS]:
        labels = [record.model, record.run, record.name, record.tier]
        page.put("run_heartbeat_timestamp_seconds", labels, record.heartbeat)
        for state in RUN_STATES:
            page.put("run_heartbeat_state", [record.model, record.run, state], state == record.state)


def _retrains(page: Page, records: Iterable[RunRecord]) -> None:
    by_model: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        by_model[record.model].append(record)
    for model, of_model in sorted(by_model.items()):
        outcomes = Counter(record.outcome for record in of_model)
        for outcome in END_STATES:
            page.put("retrains", [model, outcome], outcomes[outcome])
        newest = sorted(of_model, key=lambda record: record.end)[-RECENT_RUNS:]
        page.put("retrains_recent_bad", [model], sum(record.outcome != "finished" for record in newest))
        page.put("retrain_duration_seconds", [model], newest[-1].duration)


def _model(page: Page, model: Model, newest: Mapping[str, Newest]) -> None:
    for version in model.versions:
        _version(page, version)
    for name, budget in sorted(_budgets(model).items()):
        page.put("score_drop_budget", [model.name, name], budget)
    current = model.current
    if current is None or current.facts is None:
        return
    last = newest.get(current.trained_as or model.name)
    if last is not None:
        for name, change in drift(current.facts, last.facts).items():
            page.put("hyperparameter_drift", [model.name, name], change)


def _version(page: Page, version: Version) -> None:
    facts = version.facts
    words = facts.words if facts is not None else {}
    about = [words.get("optimizer", ""), words.get("scheduler", "")]
    page.put("model_version_info", [version.model, version.alias, version.version, version.run, *about], 1)
    page.put("metadata_complete", [version.model, version.version], not version.missing)
    for name, value in version.costs.items():
        page.put("model_version_score", [version.model, version.version, name], value)
    if facts is None:
        return
    for metric, values in (
        ("model_version_score", facts.scores),
        ("model_version_gap", facts.gaps),
        ("model_version_hyperparameter", facts.numbers),
    ):
        for name, value in _first(values):
            page.put(metric, [version.model, version.version, name], value)


def _budgets(model: Model) -> dict[str, float]:
    """A budget for each score of the current version: the one for its name, else the model's."""
    named = {name: value for name, value in model.score_drop_budgets.items() if name}
    every = model.score_drop_budgets.get("")
    facts = model.current.facts if model.current is not None else None
    if every is not None and facts is not None:
        named = {name: every for name, _ in _first(facts.scores)} | named
    return named


#: Names that dashboards and rules ask for are never cut off by many others.
_WANTED: Final = ("weight_decay", "max_norm", "lr", "learning_rate", "batch_size", "loss")


def _first(values: Mapping[str, float]) -> list[tuple[str, float]]:
    ordered = sorted(values.items(), key=lambda item: (item[0] not in _WANTED, item[0]))
    return ordered[:MAX_NAMES]


class BridgeExposition(Collector):
    """The last poll's page, and counts as of the scrape."""

    def __init__(self, counts: Callable[[], Counts]) -> None:
        self._counts = counts
        self._page = Page()
        #: Unix time and seconds of the last good poll.
        self.polled_at: float | None = None
        self.poll_seconds: float | None = None
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def show(self, page: Page) -> None:
        self._page = page

    def describe(self) -> Iterable[Family]:
        return []

    def collect(self) -> Iterator[Family]:
        page = Page(dict(self._page.samples))
        page.put("bridge_last_poll_timestamp_seconds", [], self.polled_at)
        page.put("bridge_poll_seconds", [], self.poll_seconds)
        counts = self._counts()
        for result in WEBHOOK_RESULTS:
            page.put("bridge_webhooks", [result], counts.webhooks[result])
        for result in ANNOTATION_RESULTS:
            page.put("bridge_annotations", [result], counts.annotations[result])
        page.put("bridge_reaped_runs", [], counts.reaped)
        yield from page.families()

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The exposition and its content type: OpenMetrics where ``accept`` asks for it, else the classic text."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type
