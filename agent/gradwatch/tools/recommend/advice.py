"""What can be recommended from one run: for each optimizer a clip threshold, for each group a weight decay."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gradwatch.collect.model import Finding
from gradwatch.tools.recommend.decay import DecayAdvice, weight_decay
from gradwatch.tools.recommend.threshold import ClipAdvice, clip_threshold
from gradwatch.tools.report.record import Record


@dataclass(frozen=True, slots=True)
class Advice:
    """Everything that is recommended for the next run of this kind."""

    run: str
    run_name: str
    model: str
    clip: tuple[ClipAdvice, ...]
    weight_decay: tuple[DecayAdvice, ...]


def recommend(record: Record, findings: Sequence[Finding]) -> Advice:
    """Recommend from what the journals of a run hold, and what was found wrong with it."""
    manifest = record.facts.manifest
    clip: list[ClipAdvice] = []
    decay: list[DecayAdvice] = []
    for index, (optimizer, steps) in enumerate(zip(manifest.optimizers, record.optimizers.values())):
        partial = record.missed > 0 and len(steps) > 0 and int(steps.step[0]) > 0
        clip.append(clip_threshold(index, optimizer, steps, findings, partial))
        decay += weight_decay(index, record, steps, findings, clip[-1].seen)
    facts = record.facts
    return Advice(facts.run, facts.run_name, facts.model, tuple(clip), tuple(decay))


# -- for people


def as_text(advice: Advice) -> str:
    """The recommendation first, then what it is made from, why, and on whose word."""
    lines = [f"{advice.model}: {advice.run_name} ({advice.run})", ""]
    several = len(advice.clip) > 1
    for clip in advice.clip:
        lines += [*_clip(clip, several), ""]
    for decay in advice.weight_decay:
        lines += [*_decay(decay, several or len(advice.weight_decay) > 1), ""]
    return "\n".join(lines).rstrip()


def _clip(advice: ClipAdvice, several: bool) -> Iterator[str]:
    of = f" of optimizer {advice.optimizer}" if several else ""
    if advice.max_norm is None:
        yield f"Clip threshold{of}: no constant is recommended."
    else:
        yield f"Clip threshold{of}: max_norm = {advice.max_norm:g} ({advice.rule}; {advice.clip_rate:.1%} of the steps)"
    for reason in advice.reasons:
        yield f"  {reason}"
    for other in advice.instead:
        yield f"  Instead, {other.how}. It would have clipped {_rates(other.clip_rate, other.by_quarter)}."
    seen = advice.seen
    gone = " (the journal keeps no earlier ones)" if seen.partial else ""
    yield f"  steps seen  {seen.first_step:,} to {seen.last_step:,}{gone}; {seen.used:,} of {seen.steps:,} used"
    if seen.aside:
        causes = f" ({', '.join(seen.findings)})" if seen.findings else ""
        aside = ", ".join(
            f"{count:,} {what}{causes if what == 'findings' else ''}" for what, count in seen.aside.items()
        )
        yield f"  set aside   {aside}"
    if advice.quantiles:
        told = "   ".join(f"p{q.percentile} {q.value:.3g} [{q.low:.3g}, {q.high:.3g}]" for q in advice.quantiles)
        yield f"  norm        {told}   (pre-clip, good steps; 95 % intervals)"
    if advice.drift is not None:
        medians = ", ".join(f"{median:.3g}" for median in advice.scale)
        yield f"  drift       {advice.drift:.2f} times; medians by quarter {medians}"
    if advice.candidates:
        yield "  clip rate   that each threshold would have had, findings included:"
        for candidate in advice.candidates:
            rates = _rates(candidate.clip_rate, candidate.by_quarter)
            yield f"    {candidate.name:<9} {candidate.max_norm:<9.4g} {rates}"
    for prior in advice.priors:
        yield f"  source      {prior}."


def _rates(rate: float, by_quarter: Sequence[float]) -> str:
    return f"{rate:.1%} (by quarter {', '.join(f'{quarter:.1%}' for quarter in by_quarter)})"


_MOVES = {
    "keep": "keep {present:g}",
    "raise": "raise {present:g} to {value:g}",
    "lower": "lower {present:g} to {value:g}",
    "cannot matter": "{present:g} cannot matter",
    "decouple": "{present:g} is coupled to an adaptive optimizer",
    "unknown": "nothing can be said of {present:g}",
}


def _decay(advice: DecayAdvice, several: bool) -> Iterator[str]:
    of = f" of group {advice.group} of {advice.optimizer}" if several else ""
    yield f"Weight decay{of}: {_MOVES[advice.move].format(present=advice.present, value=advice.weight_decay)}"
    for reason in advice.reasons:
        yield f"  {reason}"
    if advice.timescale is not None:
        yield f"  timescale   1 / (lr·λ) is {advice.timescale:,.0f} steps at the median of the rate"
    for prior in advice.priors:
        yield f"  source      {prior}."
