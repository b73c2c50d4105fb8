"""Registered models: which version is current, which was before it, and what their runs recorded.

The current version is the one with the first alias of ``aliases`` that the
model has, else the newest at stage Production, else the newest at all. The
previous one has the alias ``previous``, else is named by the model's tag
``gradwatch.previous_version``, else is the newest version before the current
one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gradwatch.journal.manifest import clean_text
from gradwatch.sinks.mlflow.entities import PREFIX
from gradwatch.sinks.mlflow.facts import COSTS, MAX_LABEL, PREVIOUS_TAG, Facts, facts_of, number
from gradwatch.sinks.mlflow.history import History, Page, quote
from gradwatch.sinks.mlflow.tracking import RUN_TAG

DEFAULT_ALIASES: Final = ("champion", "production", "prod")
PREVIOUS: Final = "previous"
#: A model's tag: the relative drop of a score that it tolerates.
BUDGET_TAG: Final = f"{PREFIX}score_drop_budget"
MODEL_TAG: Final = f"{PREFIX}model"

_PAGE: Final = 100
MAX_MODELS: Final = 10_000
#: Seconds for which the versions of a model and what a run recorded are not read again.
KEEP_SECONDS: Final = 600.0
#: Hyperparameters of which a change since the current version is told.
_DRIFTING: Final = (
    "weight_decay", "max_norm", "lr", "learning_rate", "batch_size", "momentum", "dropout", "label_smoothing",
    "accumulation_steps", "gradient_accumulation_steps", "accumulate_grad_batches",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Version:
    """The current or the previous version of a model."""

    model: str
    #: The alias or stage by which it is current, "latest" without one; or "previous".
    alias: str
    version: str
    run_id: str
    #: The run and the model of gradwatch behind it; "" where another program trained it.
    run: str
    trained_as: str
    #: None where its run is gone.
    facts: Facts | None
    costs: Mapping[str, float]

    @property
    def missing(self) -> tuple[str, ...]:
        """What an audit would ask for and not find."""
        if self.facts is None:
            return ("the run behind it",)
        return self.facts.missing if self.facts.scores else (*self.facts.missing, "validation score")


@dataclass(frozen=True, slots=True)
class Model:
    """A registered model as it stands."""

    name: str
    current: Version | None
    previous: Version | None
    #: Tolerated relative drop by score; "" for every score that is not named.
    score_drop_budgets: Mapping[str, float]

    @property
    def versions(self) -> Sequence[Version]:
        return [version for version in (self.current, self.previous) if version is not None]


class VersionsPoll:
    """Keeps :attr:`models` up to date; a model costs no call of its own while nothing about it changes."""

    def __init__(
        self,
        history: History,
        aliases: Sequence[str] = DEFAULT_ALIASES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._history = history
        self._aliases = tuple(aliases)
        self._clock = clock
        self.models: dict[str, Model] = {}
        #: The versions (model, number) that a run of MLflow is behind, of those listed.
        self.of_run: dict[str, list[tuple[str, str]]] = {}
        self._found: dict[str, Model] = {}
        self._token: str | None = None
        self._left: list[Any] = []
        self._listed: dict[tuple[str, int], tuple[float, list[Any]]] = {}
        self._runs: dict[str, tuple[float, tuple[str, str, Facts] | None]] = {}

    def poll(self, in_time: Callable[[], bool]) -> None:
        """Read on while ``in_time``, from where the last poll stopped. Raises ``TrackingError``."""
        while in_time():
            if not self._left:
                page: Page = self._history.models(_PAGE, self._token)
                self._left, self._token = list(page.items), page.token
            while self._left and in_time():
                model = self._read(self._left[0])
                self._left.pop(0)
                self.models[model.name] = self._found[model.name] = model
            if not self._left and (self._token is None or len(self._found) >= MAX_MODELS):
                self.models, self._found, self._token = self._found, {}, None
                self._forget()
                return

    def _read(self, registered: Any) -> Model:
        name = str(registered.name)
        current, alias = self._current(registered)
        previous = self._previous(registered, current) if current is not None else None
        budgets = {
            key.removeprefix(BUDGET_TAG).lstrip("."): value
            for key, text in registered.tags.items()
            if key.startswith(BUDGET_TAG) and (value := number(text)) is not None
        }
        return Model(
            clean_text(name, MAX_LABEL),
            self._version(current, alias) if current is not None else None,
            self._version(previous, PREVIOUS) if previous is not None else None,
            budgets,
        )

    # -- which versions

    def _current(self, registered: Any) -> tuple[Any | None, str]:
        aliases: Mapping[str, str] = registered.aliases or {}
        for alias in self._aliases:
            found = self._numbered(registered, aliases[alias]) if alias in aliases else None
            if found is not None:
                return found, alias
        by_stage = {str(v.current_stage): v for v in registered.latest_versions or () if v.current_stage}
        if "Production" in by_stage:
            return by_stage["Production"], "production"
        versions = self._versions(registered)
        return (versions[0], "latest") if versions else (None, "")

    def _previous(self, registered: Any, current: Any) -> Any | None:
        named = (registered.aliases or {}).get(PREVIOUS) or registered.tags.get(PREVIOUS_TAG)
        if named and str(named) != str(current.version):
            found = self._numbered(registered, named)
            if found is not None:
                return found
        earlier = [v for v in self._versions(registered) if int(v.version) < int(current.version)]
        return earlier[0] if earlier else None

    def _numbered(self, registered: Any, number: object) -> Any | None:
        """A version by its number; one that is older than those listed is asked for by itself."""
        for version in self._versions(registered):
            if str(version.version) == str(number):
                return version
        name = quote(str(registered.name))
        if name is None or not str(number).isdecimal():
            return None
        found = self._history.versions(f"name = {name} AND version_number = {number}", 1)
        return found[0] if found else None

    def _versions(self, registered: Any) -> list[Any]:
        """The newest versions of a model, newest first; read again where the model was changed, or after a while."""
        key, now = (str(registered.name), int(registered.last_updated_timestamp or 0)), self._clock()
        at, versions = self._listed.get(key, (-KEEP_SECONDS, []))
        if now >= at + KEEP_SECONDS:
            name = quote(key[0])
            versions = list(self._history.versions(f"name = {name}")) if name is not None else []
            self._listed[key] = now, versions
        return versions

    # -- what is behind one

    def _version(self, version: Any, alias: str) -> Version:
        run_id = str(version.run_id or "")
        run, trained_as, facts = self._behind(run_id) or ("", "", None)
        costs = {name: value for name in COSTS if (value := self._cost(name, version.tags, facts)) is not None}
        model = clean_text(version.name, MAX_LABEL)
        return Version(model, alias, str(version.version), run_id, run, trained_as, facts, costs)

    def _behind(self, run_id: str) -> tuple[str, str, Facts] | None:
        """Run, model and facts of the run behind a version."""
        if not run_id:
            return None
        at, known = self._runs.get(run_id, (-KEEP_SECONDS, None))
        if self._clock() >= at + KEEP_SECONDS:
            entity = self._history.run(run_id)
            known = None
            if entity is not None:
                tags = entity.data.tags
                names = [clean_text(tags.get(key, ""), MAX_LABEL) for key in (RUN_TAG, MODEL_TAG)]
                known = names[0], names[1], facts_of(entity)
            self._runs[run_id] = self._clock(), known
        return known

    @staticmethod
    def _cost(name: str, tags: Mapping[str, str], facts: Facts | None) -> float | None:
        for key in (name, PREFIX + name):
            if (value := number(tags.get(key))) is not None:
                return value
        return None if facts is None else facts.scores.get(name, facts.numbers.get(name))

    def _forget(self) -> None:
        """Let go of what is old, and index the rest by run."""
        now = self._clock()
        self._listed = {key: kept for key, kept in self._listed.items() if now < kept[0] + 2 * KEEP_SECONDS}
        self._runs = {key: kept for key, kept in self._runs.items() if now < kept[0] + 2 * KEEP_SECONDS}
        of_run: dict[str, list[tuple[str, str]]] = {}
        for version in {
            (str(v.name), str(v.version)): v for _, listed in self._listed.values() for v in listed
        }.values():
            if version.run_id:
                of_run.setdefault(str(version.run_id), []).append((str(version.name), str(version.version)))
        self.of_run = of_run


def drift(current: Facts, newest: Facts) -> dict[str, float]:
    """How far a run is from the current version: |new − old| / |old| by hyperparameter, without sign.

    1 where the old value is 0 or one side has none; for the words ``optimizer``
    and ``scheduler`` 1 where they differ, else 0.
    """
    changes: dict[str, float] = {}
    for name in _DRIFTING:
        old, new = current.numbers.get(name), newest.numbers.get(name)
        if old is None and new is None:
            continue
        changes[name] = 1.0 if old is None or new is None else _relative(old, new)
    for name in ("optimizer", "scheduler"):
        if name in current.words or name in newest.words:
            changes[name] = float(current.words.get(name) != newest.words.get(name))
    return changes


def _relative(old: float, new: float) -> float:
    if old == new:
        return 0.0
    return abs(new - old) / abs(old) if old else 1.0
