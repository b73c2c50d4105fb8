"""How a run did, in sentences: the worst first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gradwatch.collect.model import Finding
from gradwatch.collect.validations import gap_budget
from gradwatch.tools.report.record import Record, Steps

Tone = Literal["bad", "warn", "good", "plain"]


@dataclass(frozen=True, slots=True)
class Sentence:
    """One thing to know of a run; ``tone`` says how it bodes."""

    tone: Tone
    text: str


def verdict(record: Record, findings: Sequence[Finding]) -> list[Sentence]:
    """The sentences that open a report."""
    said = [_end(record), _findings(findings), *_loss(record), *_clip(record), *_steps(record)]
    order: dict[Tone, int] = {"bad": 0, "warn": 1, "good": 2, "plain": 3}
    return [said[0], *sorted(said[1:], key=lambda sentence: order[sentence.tone])]


def _end(record: Record) -> Sentence:
    steps = record.main
    last = int(steps.step[-1]) if len(steps) else -1
    took = f" after {last + 1:,} steps" if last >= 0 else " before its first step"
    if record.end is None:
        return Sentence(
            "plain", f"The run is under way, at step {last:,}." if last >= 0 else "The run has no step yet."
        )
    if record.end.state == "finished":
        return Sentence("good", f"The run finished{took}.")
    reason = record.end.reason or record.end.message or "no reason is known"
    return Sentence("bad", f"The run ended as {record.end.state}{took}: {reason}")


def _findings(findings: Sequence[Finding]) -> Sentence:
    serious = [finding for finding in findings if finding.severity != "info"]
    if not serious:
        notes = len(findings)
        return Sentence(
            "good", "Nothing was found wrong." if not notes else f"Nothing serious was found; {notes} to note."
        )
    first = serious[0]
    codes = list(dict.fromkeys(finding.code for finding in serious))
    others = f" Then: {', '.join(codes[1:4])}." if len(codes) > 1 else ""
    tone: Tone = "bad" if any(f.severity == "page" for f in serious) else "warn"
    return Sentence(tone, f"The first thing that went wrong is {first.code}: {first.message}{others}")


def _loss(record: Record) -> list[Sentence]:
    said = []
    loss = record.main.loss[np.isfinite(record.main.loss)]
    if len(loss) >= 20:
        tenth = max(len(loss) // 10, 5)
        begin, end = float(np.median(loss[:tenth])), float(np.median(loss[-tenth:]))
        tone: Tone = "warn" if end >= begin and begin > 0 else "plain"
        said.append(Sentence(tone, f"The training loss went from {begin:.4g} to {end:.4g} (medians of a tenth each)."))
    gaps = [(v, metric, gap) for v in record.validations for metric, gap in v.gaps.items()]
    if gaps:
        last, metric, gap = next(
            ((v, m, g) for v, m, g in reversed(gaps) if not v.slice), (gaps[-1][0], gaps[-1][1], gaps[-1][2])
        )
        budget = gap_budget(record.facts.manifest.budgets, metric)
        over = gap > budget
        where = f" on slice {last.slice}" if last.slice else ""
        text = (
            f"At step {last.step:,} {metric}{where} was {abs(gap):.1%} {'worse' if gap > 0 else 'better'} on "
            f"validation than on training; the budget is {budget:.0%}."
        )
        said.append(Sentence("warn" if over else "plain", text))
    return said


def _clip(record: Record) -> list[Sentence]:
    said = []
    for name, steps in record.optimizers.items():
        known = np.isfinite(steps.threshold) & steps.taken
        if not known.any():
            continue
        rate = float(steps.clipped[known].mean())
        budget = record.facts.manifest.budgets.get("clip_rate", 0.1)
        budget = float(budget) if isinstance(budget, int | float) else 0.1
        which = f" of optimizer {name}" if len(record.optimizers) > 1 else ""
        threshold = steps.threshold[known][-1]
        norm = steps.norm[np.isfinite(steps.norm)]
        p99 = f"; the p99 of the norm is {np.percentile(norm, 99):.4g}" if len(norm) else ""
        tone: Tone = "warn" if rate > budget else "plain"
        said.append(
            Sentence(
                tone, f"{rate:.1%} of the steps{which} were clipped at {threshold:.4g} (budget {budget:.0%}){p99}."
            )
        )
    if not said:
        said.append(Sentence("plain", "Nothing clipped the gradients."))
    return said


def _steps(record: Record) -> list[Sentence]:
    said = []
    broken = sum(int((steps.nonfinite & steps.taken).sum()) for steps in record.optimizers.values())
    skipped = sum(int((~steps.taken).sum()) for steps in record.optimizers.values())
    replayed = int(record.main.replayed.sum())
    if broken:
        said.append(Sentence("bad", f"{broken:,} steps were taken with a gradient or loss that was not finite."))
    if skipped:
        said.append(Sentence("plain", f"{skipped:,} steps were skipped by the GradScaler."))
    if record.restarts:
        text = f"The run was started again {len(record.restarts)} time{'s' if len(record.restarts) > 1 else ''}"
        said.append(Sentence("warn", f"{text}; {replayed:,} steps were trained twice." if replayed else f"{text}."))
    if record.missed:
        said.append(
            Sentence(
                "plain", f"The journal reaches back to step {_oldest(record.main):,}: {record.missed:,} rows are gone."
            )
        )
    return said


def _oldest(steps: Steps) -> int:
    return int(steps.step[0]) if len(steps) else 0
