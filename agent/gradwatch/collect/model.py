"""What passes from the journals to the detectors and the sinks: plain, immutable facts of a run.

A sink sees a run's life as a stream of these (:class:`Sink`); the Prometheus
sink also reads the present state. Nothing here knows where a fact came from or
where it goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from gradwatch.catalog import Severity
from gradwatch.journal.manifest import Manifest


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Who a run is. ``manifest`` is rank 0's of the present attempt."""

    run: str
    attempt: int
    manifest: Manifest
    #: Flat hyperparameters: the manifest's, with what was learned later merged over them.
    hyperparameters: Mapping[str, float | int | str | bool | None]
    #: Unix time at which the first attempt started.
    start_time: float

    @property
    def model(self) -> str:
        return self.manifest.model

    @property
    def run_name(self) -> str:
        return self.manifest.run_name or self.run


@dataclass(frozen=True, slots=True)
class Window:
    """A fold of consecutive steps of one optimizer; its edges are functions of (attempt, step).

    Means, maxima and last values are over the finite values of the window;
    None where there was none. Norms are pre-clip, unscaled and global.
    """

    optimizer: str
    attempt: int
    first_step: int
    last_step: int
    #: Unix times of the first and the last row.
    start_time: float
    end_time: float
    steps: int
    clipped: int
    nonfinite: int
    skipped: int
    #: Steps that an earlier attempt had trained already.
    replayed: int
    #: name -> value, e.g. ``loss_mean``, ``loss_last``, ``loss_max``, ``grad_norm_mean``, ``grad_norm_max``,
    #: ``grad_norm_last``, ``clip_coefficient_mean``, ``clip_threshold_last``, ``learning_rate_last/<group>``,
    #: ``weight_decay_last/<group>``, ``weight_norm_last``, ``update_ratio_last``, ``loss_scale_last``,
    #: ``step_seconds_mean``, ``samples``. Non-finite values are counted in ``nonfinite_values``, never kept.
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Validation:
    """One call of ``log_validation``, with the gap to training where both sides are known."""

    step: int
    attempt: int
    time: float
    slice: str
    metrics: Mapping[str, float]
    #: metric -> relative gap, positive when validation is worse.
    gaps: Mapping[str, float] = field(default_factory=dict)
    #: metric -> training value that the gap was taken to.
    training: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong, in words, with evidence. Contract findings come from the probe, health findings from
    the detectors."""

    code: str
    severity: Severity
    run: str
    step: int
    time: float
    message: str
    evidence: Mapping[str, Any]
    advice: str
    rank: int = 0
    attempt: int = 0
    active: bool = True


@dataclass(frozen=True, slots=True)
class RunEnd:
    """How a run ended: ``state`` is one of the catalogue's end states; the rest says why, as far as known."""

    state: str
    reason: str
    time: float
    last_step: int
    type: str = ""
    message: str = ""
    exit_code: int | None = None
    signal: int | None = None


@dataclass(frozen=True, slots=True)
class LayerTable:
    """Per-tensor facts at one sampled step: a column a name of ``names``, NaN where not measured."""

    step: int
    attempt: int
    time: float
    names: Sequence[str]
    grad_norm: Sequence[float]
    weight_norm: Sequence[float]
    update_ratio: Sequence[float]


class Sink(Protocol):
    """Where facts go. Methods are called from the agent's loop and must not wait on the network:
    they queue; a sink delivers in its own thread and counts what fails (``sink_errors``, ``sink_backlog``,
    ``sink_dropped`` of the catalogue). Everything is identified by (run, attempt, step), so that a fact that
    is delivered twice does no harm."""

    name: str

    def run_started(self, facts: RunFacts) -> None:
        """A run, a new attempt of one, or changed facts (call it again: it is idempotent)."""

    def window(self, facts: RunFacts, window: Window) -> None: ...

    def validation(self, facts: RunFacts, validation: Validation) -> None: ...

    def finding(self, facts: RunFacts, finding: Finding) -> None: ...

    def layers(self, facts: RunFacts, table: LayerTable) -> None: ...

    def heartbeat(self, facts: RunFacts, state: str, step: int, time: float) -> None:
        """Once a minute and at each change of state, while the run lives."""

    def run_ended(
        self,
        facts: RunFacts,
        end: RunEnd,
        summary: Mapping[str, Any],
        last_steps: Mapping[str, Sequence[float]],
    ) -> None:
        """The end, after every window: ``summary`` becomes ``summary.json``, ``last_steps`` a table (column ->
        values)."""

    def pending(self) -> int:
        """Items not yet delivered."""

    def close(self, deadline: float) -> None:
        """Deliver what is pending until ``deadline`` (monotonic seconds), then let go."""
