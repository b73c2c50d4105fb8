"""``clip-rate-high``: more steps are clipped than the run's budget allows."""

from __future__ import annotations

import math
from typing import Any, Final

from gradwatch.catalog import Severity
from gradwatch.collect.fold import clip_rate_budget
from gradwatch.collect.model import Finding
from gradwatch.collect.recent import RECENT_STEPS, Recent
from gradwatch.detect.curves import Moment

#: Share of clipped steps above which the clip is no guard any more but the rule.
MOST: Final = 0.5
#: Below this share of the budget it is over.
OVER: Final = 0.8
#: Steps at the beginning that are not judged: warmup clips by design.
WARMUP_STEPS: Final = 200
#: How often it is judged.
EVERY: Final = 50
#: What makes a high clip rate serious.
LOSS_FINDINGS: Final = frozenset({"loss-spike", "loss-diverging", "loss-not-decreasing", "learning-rate-too-high"})


class ClipRateHigh:
    """The clip rate of the recent window above the budget.

    The window is the last 30 minutes, reaching back to at least 200 steps, all
    of them behind warmup: behind the first 200 steps of the attempt, and behind
    the last rise of the learning rate (:class:`gradwatch.detect.past.Warmup`).
    Judged every 50 steps for each optimizer. A ticket above the run's budget
    (10 % unless it says otherwise), raised once more above 50 %: the clip then
    sets the size of every step. A page above 50 % only, for a production run, or
    while a finding on the loss of the same optimizer is active: policy
    gradients, tiny batches and warmup clip much by design. Over when the rate is
    below 80 % of the budget.

    What a clip rate does depends on the optimizer: with SGD a constant clip
    coefficient is a lower learning rate; optimizers that divide by the size of
    past gradients divide it out again (Zhang et al., 2020, *Why Gradient
    Clipping Accelerates Training*; Kingma & Ba, 2015, *Adam*, § 2.1).
    """

    code = "clip-rate-high"

    def __init__(self) -> None:
        self._recent = Recent()
        #: How much was told: 0 nothing, 1 above budget, 2 above half, 3 and serious.
        self._level = 0

    def begin(self) -> None:
        """A new attempt warms up anew; what is active stays so until it is judged again."""
        self._recent = Recent()

    def judge(self, now: Moment) -> list[Finding]:
        block = now.block
        if block.position > WARMUP_STEPS and now.past.warmup.over:
            self._recent.add(block.steps)
        counts = self._recent.counts
        if block.position % EVERY or counts.steps < RECENT_STEPS or math.isnan(block.threshold):
            return []
        assert now.seen.facts is not None
        budget = clip_rate_budget(now.seen.facts.manifest.budgets)
        rate = counts.clipped / counts.steps
        troubles = sorted(LOSS_FINDINGS & now.past.troubles)
        serious = bool(troubles) or now.seen.facts.manifest.tier == "production"
        level = 0 if rate <= budget else 1 if rate <= max(budget, MOST) else 3 if serious else 2
        evidence: dict[str, Any] = {
            "clip_rate": rate,
            "budget": budget,
            "steps": counts.steps,
            "clipped": counts.clipped,
            "clip_threshold": block.threshold,
            "loss_findings": troubles,
        }
        if self._level and rate < OVER * budget:
            self._level = 0
            message = (
                f"The clip rate is {rate:.1%} of the last {counts.steps} steps, within the budget of {budget:.0%}."
            )
            return now.found(self.code, message, evidence, active=False)
        if level <= self._level:
            return []
        self._level = level
        severity: Severity = "page" if level == 3 else "ticket"
        beside = f" At the same time: {', '.join(troubles)}." if troubles else ""
        message = (
            f"{rate:.1%} of the last {counts.steps} steps were clipped ({counts.clipped}); the budget is "
            f"{budget:.0%}.{beside}"
        )
        return now.found(self.code, message, evidence, severity=severity, advice=self._advice(now, rate))

    @staticmethod
    def _advice(now: Moment, rate: float) -> str:
        first = (
            "Above half of the steps, look at loss scale, data and learning rate before the threshold."
            if rate > MOST
            else "Compare the threshold with the p99 of unclipped norms (gradwatch recommend)."
        )
        effect = (
            f"With {now.optimizer.class_name or 'SGD'} each clipped step is a smaller one: a threshold that binds most "
            "of the time is a lower learning rate."
            if now.optimizer.linear
            else f"With {now.optimizer.class_name or 'an adaptive optimizer'} a constant clip coefficient changes "
            "hardly anything, since it divides by the size of past gradients; what is lost is the guard, for a "
            "threshold among the usual norms tells no outlier."
        )
        by_design = "Policy gradients and tiny batches clip much by design: set clip_rate_budget to say so."
        return f"{first} {effect} {by_design}"

    def to_state(self) -> Any:
        return [self._recent.to_state(), self._level]

    def restore(self, state: Any) -> None:
        self._recent, self._level = Recent.from_state(state[0]), int(state[1])
