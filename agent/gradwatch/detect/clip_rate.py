"""``clip-rate-high``: more steps are clipped than the run's budget allows."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from gradwatch.catalog import Severity
from gradwatch.collect.fold import clip_rate_budget
from gradwatch.collect.model import Finding
from gradwatch.collect.recent import RECENT_STEPS, Recent
from gradwatch.collect.rows import CLIPPED_BY_NORM, Rows
from gradwatch.collect.run import Observation
from gradwatch.detect.detector import found

CODE: Final = "clip-rate-high"
#: Share of clipped steps above which the clip is no guard any more but the rule.
MOST: Final = 0.5
#: Below this share of the budget it is over.
OVER: Final = 0.8
#: Steps at the beginning that are not judged: warmup clips by design.
WARMUP_STEPS: Final = 200
#: How often it is judged.
EVERY: Final = 50


class ClipRateHigh:
    """The clip rate of the recent window above the budget.

    The window is the last 30 minutes, reaching back to at least 200 steps,
    all of them behind the first 200 steps of the attempt. Judged every 50
    steps for each optimizer. A ticket above the run's budget (10 % unless it
    says otherwise); above 50 % it is raised once more and says so, and is a
    page for a production run: the clip then sets the size of every step.
    Over when the rate is below 80 % of the budget.
    """

    codes = (CODE,)

    def __init__(self) -> None:
        self._watched: dict[int, _Watched] = {}

    def observe(self, seen: Observation) -> list[Finding]:
        if seen.facts is None or seen.rank != 0:
            return []
        if seen.begun:
            # A new attempt warms up anew; what is active stays so until it is judged again.
            self._watched = {index: _Watched(level=old.level) for index, old in self._watched.items()}
        rows = seen.rows.take(seen.rows.plausible & seen.rows.taken)
        findings: list[Finding] = []
        for optimizer in np.unique(rows.optimizer).tolist():
            watched = self._watched.setdefault(optimizer, _Watched())
            findings += self._judge(seen, watched, rows.take(rows.optimizer == optimizer), optimizer)
        return findings

    def _judge(self, seen: Observation, watched: _Watched, rows: Rows, optimizer: int) -> list[Finding]:
        findings = []
        at = 0
        while at < len(rows):
            stop = min(len(rows), at + EVERY - watched.steps % EVERY)
            part = rows.take(slice(at, stop))
            warm = max(0, min(len(part), WARMUP_STEPS - watched.steps))
            watched.recent.add(part.take(slice(warm, None)))
            watched.steps += len(part)
            at = stop
            if watched.steps % EVERY == 0 and (finding := self._verdict(seen, watched, part, optimizer)):
                findings.append(finding)
        return findings

    def _verdict(self, seen: Observation, watched: _Watched, rows: Rows, optimizer: int) -> Finding | None:
        counts = watched.recent.counts
        clips = (rows.flags & CLIPPED_BY_NORM) != 0
        if counts.steps < RECENT_STEPS or not clips.any():
            return None
        assert seen.facts is not None
        budget = clip_rate_budget(seen.facts.manifest.budgets)
        rate = counts.clipped / counts.steps
        level = 2 if rate > max(budget, MOST) else 1 if rate > budget else 0
        step, time = int(rows.step[-1]), float(rows.time[-1])
        evidence: dict[str, Any] = {
            "step": step,
            "optimizer": optimizer,
            "clip_rate": rate,
            "budget": budget,
            "steps": counts.steps,
            "clipped": counts.clipped,
            "clip_threshold": float(rows["clip_threshold"][-1]),
        }
        if watched.level and rate < OVER * budget:
            watched.level = 0
            message = (
                f"The clip rate is {rate:.1%} of the last {counts.steps} steps, within the budget of {budget:.0%}."
            )
            return found(CODE, seen, step=step, time=time, message=message, evidence=evidence, active=False)
        if level <= watched.level:
            return None
        watched.level = level
        severity: Severity = "page" if level == 2 and seen.facts.manifest.tier == "production" else "ticket"
        message = (
            f"{rate:.1%} of the last {counts.steps} steps were clipped ({counts.clipped}); the budget is {budget:.0%}."
        )
        return found(CODE, seen, step=step, time=time, message=message, evidence=evidence, severity=severity)

    def to_state(self) -> dict[str, Any]:
        return {
            str(index): [watched.steps, watched.level, watched.recent.to_state()]
            for index, watched in self._watched.items()
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._watched = {
            int(index): _Watched(int(steps), int(level), Recent.from_state(recent))
            for index, (steps, level, recent) in state.items()
        }


class _Watched:
    """One optimizer: its steps in this attempt, those behind the warmup, and how far above budget it was told."""

    def __init__(self, steps: int = 0, level: int = 0, recent: Recent | None = None) -> None:
        self.steps, self.level = steps, level
        self.recent = recent or Recent()
