"""The figures of a report: one idea each, with what healthy looks like above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from gradwatch.collect.model import Finding
from gradwatch.collect.validations import gap_budget
from gradwatch.tools.report import layers
from gradwatch.tools.report.drawing import (
    BLUE,
    GREY,
    LINES,
    ORANGE,
    RED,
    Figure,
    band,
    drawn,
    folded,
    line,
    mark,
    number,
)
from gradwatch.tools.report.record import Record, Steps

#: Findings that are marked in a figure.
MARKS: Final = 30


def figures(record: Record, findings: Sequence[Finding]) -> list[Figure]:
    """Every figure for which the run has data."""
    marks = [*_restarts(record), *_marks(findings)]
    made: list[Figure | None] = [
        _loss(record, marks),
        _gap(record, marks),
        *(_norm(name, steps, record, marks) for name, steps in record.optimizers.items()),
        *(_distribution(name, steps, record) for name, steps in record.optimizers.items()),
        _clip_rate(record, marks),
        _rates(record, marks),
        *layers.by_tensor(record.tensors),
        layers.weights(record.tensors, marks),
        layers.histogram(record.tensors),
        _pace(record, marks),
        _loss_scale(record, marks),
    ]
    return [figure for figure in made if figure is not None]


# -- marks


def _restarts(record: Record) -> list[dict[str, Any]]:
    return [mark(step, "restart", GREY, "dash") for step in record.restarts]


def _marks(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The first finding of each code that is no mere note."""
    first: dict[str, Finding] = {}
    for finding in findings:
        if finding.severity != "info" and finding.step >= 0:
            first.setdefault(finding.code, finding)
    return [mark(finding.step, code, RED, "dot") for code, finding in list(first.items())[:MARKS]]


def _of(name: str, record: Record) -> str:
    return f" of {name}" if len(record.optimizers) > 1 else ""


# -- loss and gap


def _loss(record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    traces: list[Any] = []
    steps = record.main
    if np.isfinite(steps.loss).any():
        x, mean, low, high = folded(steps, steps.loss, np.mean, np.min, np.max)
        traces += [*band(x, low, high, "least to largest", BLUE), line(x, mean, "training", BLUE)]
    slices = sorted({v.slice for v in record.validations if "loss" in v.metrics})
    for colour, slice_ in zip(LINES[1:], slices[:5], strict=False):
        points = [(v.step, v.metrics["loss"]) for v in record.validations if v.slice == slice_ and "loss" in v.metrics]
        name = f"validation {slice_}".strip()
        traces.append(line([x for x, _ in points], [y for _, y in points], name, colour, mode="lines+markers"))
    if not traces:
        return None
    caption = "Healthy: both fall and stay together. Validation rising while training falls is overfitting."
    known = steps.loss[np.isfinite(steps.loss)]
    # Where a few steps tower over the rest, a linear axis would show nothing but them.
    towers = len(known) > 0 and float(known.min()) > 0 and float(known.max()) > 5 * float(np.median(known))
    figure = drawn(traces, marks, yaxis_type="log" if towers else "linear")
    return Figure("loss", "Loss, training and validation", caption, figure)


def _gap(record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    keys = sorted({(metric, v.slice) for v in record.validations for metric in v.gaps})
    traces = []
    for colour, (metric, slice_) in zip(LINES, keys[:6], strict=False):
        points = [(v.step, v.gaps[metric]) for v in record.validations if v.slice == slice_ and metric in v.gaps]
        name = f"{metric} {slice_}".strip()
        traces.append(line([x for x, _ in points], [y for _, y in points], name, colour, mode="lines+markers"))
    if not traces:
        return None
    budget = gap_budget(record.facts.manifest.budgets, keys[0][0])
    figure = drawn(traces, marks, yaxis_tickformat=".0%", height=240)
    figure.add_hline(y=budget, line={"color": RED, "width": 1, "dash": "dash"})
    caption = "How much worse validation is than training. Healthy: below the red line, the budget, and not growing."
    return Figure("gap", "Generalization gap", caption, figure)


# -- gradients


def _norm(name: str, steps: Steps, record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    if not (np.isfinite(steps.norm) & (steps.norm > 0)).any():
        return None
    positive = np.where(steps.norm > 0, steps.norm, np.nan)
    x, median, p99, largest = folded(steps, positive, np.median, lambda v: np.percentile(v, 99), np.max, points=400)
    traces = [
        line(x, largest, "largest", GREY, width=1),
        line(x, p99, "p99", ORANGE),
        line(x, median, "median", BLUE),
    ]
    if np.isfinite(steps.threshold).any():
        x, threshold = folded(steps, steps.threshold, np.max, points=400)
        traces.append(line(x, threshold, "clip threshold", RED, dash="dash", width=1.2))
    caption = "Before clipping, unscaled, over all ranks. Healthy: a steady band, below the threshold but for peaks."
    figure = drawn(traces, marks, yaxis_type="log")
    return Figure(f"norm-{name}", f"Gradient norm{_of(name, record)}", caption, figure)


def _distribution(name: str, steps: Steps, record: Record) -> Figure | None:
    norm = steps.norm[np.isfinite(steps.norm) & (steps.norm > 0)]
    if len(norm) < 20:
        return None
    logs = np.log10(norm)
    counts, edges = np.histogram(logs, bins=60)
    centres = 10 ** ((edges[1:] + edges[:-1]) / 2)
    stairs = line([number(c) for c in centres], counts.tolist(), "steps", BLUE, fill="tozeroy")
    stairs.line.shape = "hvh"
    figure = drawn([stairs], xaxis_type="log", xaxis_title="gradient norm", height=240)
    threshold = steps.threshold[np.isfinite(steps.threshold) & (steps.threshold > 0)]
    lines = [(f"p{q}", np.percentile(norm, q), ORANGE, dash) for q, dash in ((50, "dot"), (99, "dash"))]
    lines += [("threshold", threshold[-1], RED, "solid")] if len(threshold) else []
    for height, (word, value, colour, dash) in zip((1.0, 0.9, 0.8), lines, strict=False):
        at = number(value)
        figure.add_vline(x=at, line={"color": colour, "width": 1.2, "dash": dash})
        # On a logarithmic axis shapes stand at the value, and words at its logarithm.
        figure.add_annotation(
            x=np.log10(at), y=height, yref="paper", text=f"{word} {at:.3g}", showarrow=False, xanchor="left",
            font={"size": 11, "color": colour},
        )  # fmt: skip
    caption = "How often each norm came. A clip at the p99 touches one step in a hundred."
    return Figure(f"distribution-{name}", f"Distribution of the gradient norm{_of(name, record)}", caption, figure)


def _clip_rate(record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    traces = []
    for colour, (name, steps) in zip(LINES, record.optimizers.items(), strict=False):
        known = np.isfinite(steps.threshold) & steps.taken
        if not known.any():
            continue
        x, rate = folded(
            steps, np.where(known, steps.clipped.astype(np.float64), np.nan), np.mean, points=_clip_points(steps)
        )
        traces.append(line(x, rate, name, colour))
    if not traces:
        return None
    budget = record.facts.manifest.budgets.get("clip_rate", 0.1)
    figure = drawn(traces, marks, yaxis_tickformat=".0%", yaxis_rangemode="tozero", height=240)
    figure.add_hline(
        y=budget if isinstance(budget, int | float) else 0.1, line={"color": RED, "width": 1, "dash": "dash"}
    )
    caption = "Share of steps that were clipped. Healthy after warmup: below the red line, the budget."
    return Figure("clip-rate", "Clip rate", caption, figure)


def _clip_points(steps: Steps) -> int:
    """A rate is told of at least fifty steps."""
    return max(min(len(steps) // 50, 100), 1)


# -- rates


def _rates(record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    traces = []
    colours = iter(LINES * 4)
    for name, steps in record.optimizers.items():
        linear = next((o.linear for o in record.facts.manifest.optimizers if (o.name or "default") == name), False)
        for group, rate in list(steps.rates.items())[:4]:
            if not np.isfinite(rate).any():
                continue
            colour = next(colours)
            label = f"{name} {group}" if len(record.optimizers) > 1 or len(steps.rates) > 1 else "learning rate"
            x, mean = folded(steps, rate, np.mean)
            traces.append(line(x, mean, label, colour))
            if linear and np.isfinite(steps.coefficient).any():
                x, effective = folded(steps, rate * steps.coefficient, np.mean, points=200)
                traces.append(line(x, effective, f"{label}, effective", colour, dash="dot", width=1.1))
    if not traces:
        return None
    caption = (
        "As the schedule set it. Effective: times the clip coefficient, shown where the step is linear in the gradient."
    )
    return Figure("rates", "Learning rate", caption, drawn(traces, marks, height=240, yaxis_rangemode="tozero"))


# -- pace and scale


def _pace(record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    duration = np.where(record.main.duration > 0, record.main.duration, np.nan)
    if not np.isfinite(duration).any():
        return None
    x, median, high = folded(record.main, duration, np.median, np.max, points=400)
    traces = [line(x, high, "longest", GREY, width=1), line(x, median, "median", BLUE)]
    figure = drawn(traces, marks, yaxis_type="log", yaxis_title="seconds", height=220)
    return Figure(
        "pace", "Time of a step", "Healthy: flat. Peaks are validations, checkpoints, or a slow loader.", figure
    )


def _loss_scale(record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    if not np.isfinite(record.main.loss_scale).any():
        return None
    x, scale = folded(record.main, record.main.loss_scale, np.min)
    figure = drawn([line(x, scale, "loss scale", BLUE)], marks, yaxis_type="log", height=220)
    return Figure("loss-scale", "Loss scale of the GradScaler", "Healthy: it climbs and halves now and then.", figure)
