"""A run that the agent follows: its tail, its findings, and what the sinks were told of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from gradwatch.collect.model import RunEnd, RunFacts, Sink
from gradwatch.collect.run import Observation, RunTail
from gradwatch.detect.ledger import Ledger

HEARTBEAT_SECONDS: Final = 60.0
STATE_VERSION: Final = 1

_log = logging.getLogger("gradwatch.agent")


class Followed:
    """Carries what a run's journals tell to the detectors and the sinks."""

    def __init__(
        self, tail: RunTail, sinks: Sequence[Sink], monotonic: Callable[[], float], wall: Callable[[], float]
    ) -> None:
        self.tail = tail
        self.ledger = Ledger()
        #: When (monotonic) the present attempt's end was told to the sinks; None while it lives.
        self.ended_at: float | None = None
        #: Unix time at which no sink held anything of an ended run any more.
        self.drained: float | None = None
        #: Whether the end has been scraped.
        self.scraped = False
        #: Whether there is something that the state on disk does not have.
        self.dirty = False
        self.saved_at = -1e9
        #: Whether a former agent had followed it.
        self.resumed = False
        #: Whether it was not polled yet.
        self.fresh = True
        self._sinks, self._monotonic, self._wall = sinks, monotonic, wall
        self._heartbeat_at = -1e9
        self._state = ""
        self._trouble = ""

    @property
    def run(self) -> str:
        return self.tail.run

    @property
    def over(self) -> bool:
        """Whether nothing more can come of what is here, and everybody was told."""
        return self.tail.over and (self.ended_at is not None or self.tail.end is None)

    def poll(self) -> bool:
        """Read once, pass on what came; whether more can be read at once."""
        for seen in self.tail.poll():
            self._pass_on(seen)
        self._complain()
        self._live()
        return self.tail.more

    def _pass_on(self, seen: Observation) -> None:
        told, facts = seen.told, seen.facts
        if len(seen.rows) or seen.events or seen.begun or seen.closed or told.tables:
            self.dirty = True
        if seen.begun and self.ended_at is not None and seen.rank == self.tail.lead.rank:
            self.ended_at, self.drained, self.scraped = None, None, False
        if facts is None:
            return
        if told.facts_changed:
            self._tell("run_started", facts)
        for finding in self.ledger.observe(seen):
            level = logging.WARNING if finding.active and finding.severity != "info" else logging.INFO
            what = "finding" if finding.active else "resolved"
            _log.log(
                level, "%s run=%s code=%s severity=%s step=%d rank=%d %s",
                what, facts.run, finding.code, finding.severity, finding.step, finding.rank, finding.message,
            )  # fmt: skip
            self._tell("finding", facts, finding)
        for window in told.windows:
            self._tell("window", facts, window)
        for validation in told.validations:
            self._tell("validation", facts, validation)
        for table in told.tables:
            self._tell("layers", facts, table)
        if seen.rank == 0 and seen.begun:
            _log.info(
                "attempt run=%s attempt=%d model=%s world_size=%d host=%s",
                facts.run, facts.attempt, facts.model, facts.manifest.world_size, facts.manifest.host,
            )  # fmt: skip

    def _live(self) -> None:
        """Heartbeats, changes of state, the end."""
        facts = self.tail.fold.facts
        if facts is None:
            if self.tail.end is not None and self.ended_at is None:
                self.ended_at, self.dirty = self._monotonic(), True
            return
        state, now = self.tail.state, self._monotonic()
        if state != self._state:
            _log.info("state run=%s state=%s step=%d", self.run, state, self.tail.last_step)
            self._state, self._heartbeat_at = state, -1e9
        if self.tail.end is not None:
            if self.ended_at is None:
                self._tell_end(facts, self.tail.end)
                self.ended_at, self.dirty = now, True
        elif now - self._heartbeat_at >= HEARTBEAT_SECONDS:
            self._heartbeat_at = now
            self._tell("heartbeat", facts, state, self.tail.last_step, self._wall())

    def _tell_end(self, facts: RunFacts, end: RunEnd) -> None:
        _log.info(
            "end run=%s attempt=%d state=%s step=%d reason=%s",
            facts.run, facts.attempt, end.state, end.last_step, end.reason,
        )  # fmt: skip
        last_steps = self.tail.last_rows() if self._sinks else {}
        self._tell("run_ended", facts, end, self.summary(end), last_steps)

    def summary(self, end: RunEnd | None) -> dict[str, Any]:
        """The run in one JSON document: its end, its counts, where its values stood, what was found."""
        fold = self.tail.fold
        facts = fold.facts
        assert facts is not None
        optimizers: dict[str, Mapping[str, Any]] = {}
        for name, one in fold.optimizers.items():
            optimizers[name] = {
                "steps": one.steps,
                "replayed_steps": one.replayed,
                "clipped_steps": one.clipped,
                "nonfinite_steps": one.nonfinite,
                "skipped_steps": one.skipped,
                "clip_rate": one.clipped / one.steps if one.steps else None,
                "last_step": one.step,
                "grad_norm_quantiles": {str(q): value for q, value in one.recent.quantiles.items()},
                **one.last,
            }
        return {
            "run": facts.run,
            "run_name": facts.run_name,
            "model": facts.model,
            "attempt": facts.attempt,
            "start_time": facts.start_time,
            "end": None if end is None else {name: getattr(end, name) for name in RunEnd.__dataclass_fields__},
            "optimizers": optimizers,
            "validations": [
                {"metric": metric, "slice": slice_, "value": s.value, "training": s.training, "gap": s.gap}
                for (metric, slice_), s in fold.validations.last.items()
            ],
            "findings": {f"{code}/{severity}": count for (code, severity), count in sorted(self.ledger.counts.items())},
            "nonfinite": fold.nonfinite or None,
            "rows_missed": {str(rank): tail.missed for rank, tail in self.tail.ranks.items()},
        }

    def _tell(self, what: str, facts: RunFacts, *arguments: Any) -> None:
        for sink in self._sinks:
            try:
                getattr(sink, what)(facts, *arguments)
            except Exception:
                _log.exception("sink-failed sink=%s what=%s run=%s", sink.name, what, facts.run)

    def _complain(self) -> None:
        """Say once what cannot be read."""
        trouble = "; ".join(self.tail.troubles)
        if trouble and trouble != self._trouble:
            _log.warning("unreadable run=%s %s", self.run, trouble)
        self._trouble = trouble

    # -- between two lives of the agent

    def to_state(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            "tail": self.tail.to_state(),
            "findings": self.ledger.to_state(),
            "ended": self.ended_at is not None,
            "drained": self.drained,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where a former agent stood. Raises where its state does not fit what is there."""
        if state["version"] != STATE_VERSION:
            raise ValueError(f"state of version {state['version']}, this agent keeps version {STATE_VERSION}")
        self.tail.restore(state["tail"])
        self.ledger.restore(state["findings"])
        self.ended_at = self._monotonic() if state["ended"] else None
        self.drained = state["drained"]
        self.resumed = True
        facts = self.tail.fold.facts
        if facts is not None:
            # A sink's own memory may be younger or older than ours; told twice does no harm.
            self._tell("run_started", facts)
