"""What the bridge keeps of an MLflow run, and how it reads it: small, and without the server's types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from gradwatch.bridge.alerts import TAG_PREFIX, is_firing
from gradwatch.catalog import END_STATES, RUN_STATES
from gradwatch.journal.manifest import clean_text
from gradwatch.sinks.mlflow.entities import PREFIX
from gradwatch.sinks.mlflow.facts import MAX_LABEL, number

#: Tags that a reaped run carries: who closed it, when and why; and the heartbeat that it had then.
REAPED_TAG: Final = f"{PREFIX}reaped"
REAPED_HEARTBEAT_TAG: Final = f"{PREFIX}reaped_heartbeat"

_OUTCOMES: Final = {"FINISHED": "finished", "FAILED": "failed", "KILLED": "killed"}


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run in MLflow. Times are Unix seconds; ``end`` is 0 while it stands at RUNNING."""

    run_id: str
    run: str
    model: str
    name: str
    tier: str
    status: str
    #: The state that its agent last told, and the step.
    state: str
    step: int
    start: float
    end: float
    #: The last heartbeat; 0 where it carries none.
    heartbeat: float
    attempt: str = ""
    #: The heartbeat that it had when the bridge closed it; None where it did not.
    reaped_at: float | None = None
    #: ``gradwatch.alert.<name>`` tags that stand at firing.
    firing: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        """Whether gradwatch wrote it: it has a model of ours."""
        return bool(self.run and self.model)

    @property
    def outcome(self) -> str | None:
        """One of ``END_STATES``, None while it runs.

        MLflow's status decides; what it calls FAILED or KILLED is ``abrupt``
        where the agent found that the run ended without a word.
        """
        outcome = _OUTCOMES.get(self.status)
        if outcome in ("failed", "killed") and self.state == "abrupt":
            return "abrupt"
        return outcome

    @property
    def duration(self) -> float:
        """Seconds from start to end; 0 where one of them is unknown or they are out of order."""
        return max(0.0, self.end - self.start) if self.start and self.end else 0.0

    @property
    def seen_at(self) -> float:
        """The last time that there was a sign of life: heartbeat, else start."""
        return self.heartbeat or self.start


def record_of(run: Any) -> RunRecord:
    """An ``mlflow.entities.Run`` as a record; a tag of nonsense is as none."""
    tags: Mapping[str, str] = run.data.tags

    def tag(name: str) -> str:
        return clean_text(tags.get(PREFIX + name, ""), MAX_LABEL)

    state = tag("state")
    reaped = tags.get(REAPED_HEARTBEAT_TAG)
    return RunRecord(
        run_id=str(run.info.run_id),
        run=tag("run"),
        model=tag("model"),
        name=clean_text(run.info.run_name or "", MAX_LABEL),
        tier=tag("tier"),
        status=str(run.info.status),
        state=state if state in RUN_STATES else "",
        step=int(tag("step")) if tag("step").isdecimal() else -1,
        start=(run.info.start_time or 0) / 1000,
        end=(run.info.end_time or 0) / 1000,
        heartbeat=number(tags.get(f"{PREFIX}heartbeat")) or 0.0,
        attempt=tag("attempt"),
        reaped_at=number(reaped) if tags.get(REAPED_TAG) else None,
        firing={key: value for key, value in tags.items() if key.startswith(TAG_PREFIX) and is_firing(value)},
    )


def has_ended(record: RunRecord) -> bool:
    """Whether the agent has told an end, whatever MLflow's status says."""
    return record.state in END_STATES
