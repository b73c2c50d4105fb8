"""The figures of a report, as plotly draws them: colours of the page, one idea each, bounded in size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped]

from gradwatch.collect.model import Finding
from gradwatch.collect.rows import F64
from gradwatch.collect.validations import gap_budget
from gradwatch.tools.report.record import Record, Steps, Tensors

#: Points of a curve, and columns of a heatmap, at most: what a wide screen shows.
POINTS: Final = 800
COLUMNS: Final = 200
#: Rows of a heatmap at most; of more tensors those with the largest norms.
LAYERS: Final = 40
#: Findings that are marked in a figure.
MARKS: Final = 30
BLUE, ORANGE, RED, GREEN, GREY = "#3b82c4", "#d97a1e", "#c8403a", "#3d9a5b", "#8a93a0"
_LINES: Final = (BLUE, ORANGE, GREEN, "#8f6cc4", "#b08a2e", GREY)
_HEAT: Final = "Viridis"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with what stands above it: a title, and what healthy looks like."""

    name: str
    title: str
    caption: str
    figure: go.Figure


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
        *_layers(record.tensors),
        _weights(record.tensors, marks),
        _histogram(record.tensors),
        _pace(record, marks),
        _loss_scale(record, marks),
    ]
    return [figure for figure in made if figure is not None]


# -- pieces


def _chunks(steps: Steps, points: int = POINTS) -> Iterator[slice | None]:
    """Consecutive rows in at most about ``points`` pieces, None between two attempts."""
    size = max(-(-len(steps) // points), 1)
    edges = np.flatnonzero(np.diff(steps.attempt)) + 1
    starts = [0, *edges.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(steps)], strict=True):
        if start:
            yield None
        for at in range(start, stop, size):
            yield slice(at, min(at + size, stop))


def _folded(steps: Steps, values: F64, *how: Callable[[F64], Any], points: int = POINTS) -> list[list[Any]]:
    """Steps, and what each of ``how`` makes of the finite values of each piece; None where there are none."""
    columns: list[list[Any]] = [[] for _ in range(1 + len(how))]
    for chunk in _chunks(steps, points):
        piece = np.empty(0) if chunk is None else values[chunk]
        piece = piece[np.isfinite(piece)]
        columns[0].append(None if chunk is None else int(steps.step[chunk][-1]))
        for column, fold in zip(columns[1:], how, strict=True):
            column.append(_number(fold(piece)) if len(piece) else None)
    return columns


def _number(value: Any) -> float:
    """Five digits are more than a screen shows."""
    return float(f"{float(value):.5g}")


def _line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, **more: Any) -> go.Scatter:
    line = {"color": colour, "width": more.pop("width", 1.6), **({"dash": more.pop("dash")} if "dash" in more else {})}
    return go.Scatter(x=list(x), y=list(y), name=name, mode=more.pop("mode", "lines"), line=line, **more)


def _band(x: Sequence[Any], low: Sequence[Any], high: Sequence[Any], name: str, colour: str) -> list[go.Scatter]:
    """The area between two curves."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    shared: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    return [
        go.Scatter(x=list(x), y=list(low), showlegend=False, **shared),
        go.Scatter(
            x=list(x), y=list(high), name=name, fill="tonexty", fillcolor=f"rgba({red},{green},{blue},0.18)", **shared
        ),
    ]


def _figure(traces: Sequence[Any], marks: Sequence[dict[str, Any]] = (), **layout: Any) -> go.Figure:
    shapes = [{k: v for k, v in mark.items() if k not in ("text",)} for mark in marks]
    figure = go.Figure(list(traces))
    figure.update_layout(
        template="none",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        margin={"l": 64, "r": 16, "t": 8, "b": 44},
        height=layout.pop("height", 320),
        hovermode=layout.pop("hovermode", "x unified"),
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        font={"family": "system-ui, sans-serif", "size": 12, "color": GREY},
        xaxis={"title": {"text": "step"}, "gridcolor": "rgba(138,147,160,.25)", "zeroline": False},
        yaxis={"gridcolor": "rgba(138,147,160,.25)", "zeroline": False, "exponentformat": "power"},
        shapes=shapes,
        annotations=[_flag(mark) for mark in marks if mark.get("text")],
    )
    figure.update_layout(**layout)
    return figure


def _mark(step: int, text: str, colour: str, dash: str) -> dict[str, Any]:
    """A vertical line through a figure, with a word at its head."""
    line = {"color": colour, "width": 1, "dash": dash}
    return {
        "type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1,
        "line": line, "text": text,
    }  # fmt: skip


def _flag(mark: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "x": mark["x0"], "y": 1, "xref": "x", "yref": "paper", "text": mark["text"], "showarrow": False,
        "textangle": -90, "xanchor": "right", "yanchor": "top", "font": {"size": 10, "color": mark["line"]["color"]},
    }  # fmt: skip


def _restarts(record: Record) -> list[dict[str, Any]]:
    return [_mark(step, "restart", GREY, "dash") for step in record.restarts]


def _marks(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """The first finding of each code that is no mere note."""
    first: dict[str, Finding] = {}
    for finding in findings:
        if finding.severity != "info" and finding.step >= 0:
            first.setdefault(finding.code, finding)
    return [_mark(finding.step, code, RED, "dot") for code, finding in list(first.items())[:MARKS]]


def _of(name: str, record: Record) -> str:
    return f" of {name}" if len(record.optimizers) > 1 else ""


# -- loss and gap


def _loss(record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    traces: list[Any] = []
    steps = record.main
    if np.isfinite(steps.loss).any():
        x, mean, low, high = _folded(steps, steps.loss, np.mean, np.min, np.max)
        traces += [*_band(x, low, high, "least to largest", BLUE), _line(x, mean, "training", BLUE)]
    slices = sorted({v.slice for v in record.validations if "loss" in v.metrics})
    for colour, slice_ in zip(_LINES[1:], slices[:5], strict=False):
        points = [(v.step, v.metrics["loss"]) for v in record.validations if v.slice == slice_ and "loss" in v.metrics]
        name = f"validation {slice_}".strip()
        traces.append(_line([x for x, _ in points], [y for _, y in points], name, colour, mode="lines+markers"))
    if not traces:
        return None
    caption = "Healthy: both fall and stay together. Validation rising while training falls is overfitting."
    known = steps.loss[np.isfinite(steps.loss)]
    # Where a few steps tower over the rest, a linear axis would show nothing but them.
    towers = len(known) > 0 and float(known.min()) > 0 and float(known.max()) > 5 * float(np.median(known))
    figure = _figure(traces, marks, yaxis_type="log" if towers else "linear")
    return Figure("loss", "Loss, training and validation", caption, figure)


def _gap(record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    keys = sorted({(metric, v.slice) for v in record.validations for metric in v.gaps})
    traces = []
    for colour, (metric, slice_) in zip(_LINES, keys[:6], strict=False):
        points = [(v.step, v.gaps[metric]) for v in record.validations if v.slice == slice_ and metric in v.gaps]
        name = f"{metric} {slice_}".strip()
        traces.append(_line([x for x, _ in points], [y for _, y in points], name, colour, mode="lines+markers"))
    if not traces:
        return None
    budget = gap_budget(record.facts.manifest.budgets, keys[0][0])
    figure = _figure(traces, marks, yaxis_tickformat=".0%", height=240)
    figure.add_hline(y=budget, line={"color": RED, "width": 1, "dash": "dash"})
    caption = "How much worse validation is than training. Healthy: below the red line, the budget, and not growing."
    return Figure("gap", "Generalization gap", caption, figure)


# -- gradients


def _norm(name: str, steps: Steps, record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    if not (np.isfinite(steps.norm) & (steps.norm > 0)).any():
        return None
    positive = np.where(steps.norm > 0, steps.norm, np.nan)
    x, median, p99, largest = _folded(steps, positive, np.median, lambda v: np.percentile(v, 99), np.max, points=400)
    traces = [
        _line(x, largest, "largest", GREY, width=1),
        _line(x, p99, "p99", ORANGE),
        _line(x, median, "median", BLUE),
    ]
    if np.isfinite(steps.threshold).any():
        x, threshold = _folded(steps, steps.threshold, np.max, points=400)
        traces.append(_line(x, threshold, "clip threshold", RED, dash="dash", width=1.2))
    caption = "Before clipping, unscaled, over all ranks. Healthy: a steady band, below the threshold but for peaks."
    figure = _figure(traces, marks, yaxis_type="log")
    return Figure(f"norm-{name}", f"Gradient norm{_of(name, record)}", caption, figure)


def _distribution(name: str, steps: Steps, record: Record) -> Figure | None:
    norm = steps.norm[np.isfinite(steps.norm) & (steps.norm > 0)]
    if len(norm) < 20:
        return None
    logs = np.log10(norm)
    counts, edges = np.histogram(logs, bins=60)
    centres = 10 ** ((edges[1:] + edges[:-1]) / 2)
    stairs = _line([_number(c) for c in centres], counts.tolist(), "steps", BLUE, fill="tozeroy")
    stairs.line.shape = "hvh"
    figure = _figure([stairs], xaxis_type="log", xaxis_title="gradient norm", height=240)
    threshold = steps.threshold[np.isfinite(steps.threshold) & (steps.threshold > 0)]
    lines = [(f"p{q}", np.percentile(norm, q), ORANGE, dash) for q, dash in ((50, "dot"), (99, "dash"))]
    lines += [("threshold", threshold[-1], RED, "solid")] if len(threshold) else []
    for height, (word, value, colour, dash) in zip((1.0, 0.9, 0.8), lines, strict=False):
        at = _number(value)
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
    for colour, (name, steps) in zip(_LINES, record.optimizers.items(), strict=False):
        known = np.isfinite(steps.threshold) & steps.taken
        if not known.any():
            continue
        x, rate = _folded(
            steps, np.where(known, steps.clipped.astype(np.float64), np.nan), np.mean, points=_clip_points(steps)
        )
        traces.append(_line(x, rate, name, colour))
    if not traces:
        return None
    budget = record.facts.manifest.budgets.get("clip_rate", 0.1)
    figure = _figure(traces, marks, yaxis_tickformat=".0%", yaxis_rangemode="tozero", height=240)
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
    colours = iter(_LINES * 4)
    for name, steps in record.optimizers.items():
        linear = next((o.linear for o in record.facts.manifest.optimizers if (o.name or "default") == name), False)
        for group, rate in list(steps.rates.items())[:4]:
            if not np.isfinite(rate).any():
                continue
            colour = next(colours)
            label = f"{name} {group}" if len(record.optimizers) > 1 or len(steps.rates) > 1 else "learning rate"
            x, mean = _folded(steps, rate, np.mean)
            traces.append(_line(x, mean, label, colour))
            if linear and np.isfinite(steps.coefficient).any():
                x, effective = _folded(steps, rate * steps.coefficient, np.mean, points=200)
                traces.append(_line(x, effective, f"{label}, effective", colour, dash="dot", width=1.1))
    if not traces:
        return None
    caption = (
        "As the schedule set it. Effective: times the clip coefficient, shown where the step is linear in the gradient."
    )
    return Figure("rates", "Learning rate", caption, _figure(traces, marks, height=240, yaxis_rangemode="tozero"))


# -- layers


def _layers(tensors: Tensors) -> list[Figure | None]:
    names = [tensor.name for tensor in tensors.tensors]
    return [
        _heatmap(
            "layer-grad", "Gradient norm by tensor", "Healthy: rows of steady colour. A row that turns dark died; all "
            "rows dark towards the input is a vanishing gradient.", names, tensors.grad_step, tensors.grad_norm,
        ),
        _heatmap(
            "layer-weight", "Weight norm by tensor", "Healthy: slow change. A row that fades is a weight that decay "
            "eats.", names, tensors.sample_step, tensors.weight_norm,
        ),
        _heatmap(
            "layer-ratio", "Update ratio by tensor", "‖Δw‖ / ‖w‖ of sampled steps. Healthy: about 1e-3; above 1e-1 a "
            "step rewrites the layer.", names, tensors.sample_step, tensors.update_ratio,
        ),
    ]  # fmt: skip


def _heatmap(name: str, title: str, caption: str, names: list[str], steps: Any, values: Any) -> Figure | None:
    """log10 of a value by tensor and step; the mean of neighbouring steps where there are many."""
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log10(np.where(np.isfinite(values) & (values > 0), values, np.nan).astype(np.float64))
    if not np.isfinite(logs).any():
        return None
    size = max(-(-len(steps) // COLUMNS), 1)
    starts = range(0, len(steps), size)
    table = np.array([_mean(logs[at : at + size]) for at in starts])
    level = _mean(table)
    shown = sorted(np.argsort(-np.where(np.isnan(level), -np.inf, level))[:LAYERS].tolist())
    z = [[None if np.isnan(v) else round(float(v), 2) for v in table[:, i]] for i in shown]
    heat = go.Heatmap(
        x=[int(steps[min(at + size, len(steps)) - 1]) for at in starts],
        y=[names[i] for i in shown],
        z=z,
        colorscale=_HEAT,
        colorbar={"title": {"text": "log10"}, "thickness": 12},
        hovertemplate="%{y}<br>step %{x}: 1e%{z}<extra></extra>",
    )
    left = min(8 + 7 * max(len(names[i]) for i in shown), 260)
    layout: dict[str, Any] = {
        "margin": {"l": left, "r": 16, "t": 8, "b": 44},
        "height": 90 + 18 * len(shown),
        "hovermode": "closest",
    }
    figure = _figure([heat], **layout)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticklabelstep=1)
    rest = f" The {LAYERS} largest of {len(names)}." if len(names) > LAYERS else ""
    return Figure(name, title, caption + rest, figure)


def _mean(values: Any) -> Any:
    """Mean over the first axis of what is known."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)


def _weights(tensors: Tensors, marks: Sequence[dict[str, Any]]) -> Figure | None:
    traces = []
    for values, name, colour, axis in (
        (tensors.global_weight_norm, "weight norm", BLUE, "y"),
        (tensors.global_update_ratio, "update ratio", ORANGE, "y2"),
    ):
        if np.isfinite(values).any():
            y = [_number(v) if np.isfinite(v) else None for v in values]
            traces.append(_line(tensors.sample_step.tolist(), y, name, colour, mode="lines+markers", yaxis=axis))
    if not traces:
        return None
    second = {"overlaying": "y", "side": "right", "type": "log", "exponentformat": "power", "showgrid": False}
    layout: dict[str, Any] = {"yaxis2": second, "height": 260, "margin": {"l": 64, "r": 64, "t": 8, "b": 44}}
    caption = "Of all weights, at sampled steps. Healthy: the norm settles, the ratio stays near 1e-3."
    return Figure("weights", "Weight norm and update ratio", caption, _figure(traces, marks, **layout))


def _histogram(tensors: Tensors) -> Figure | None:
    """Shares of the buckets over the samples; a menu chooses the tensor."""
    if tensors.histogram.shape[2] == 0 or not len(tensors.sample_step):
        return None
    buckets = tensors.histogram.shape[2]
    labels = [f"4^{b - 12}" for b in range(buckets)]
    counts = np.where(np.isfinite(tensors.histogram), tensors.histogram, 0.0)
    largest = np.argsort([-tensor.numel for tensor in tensors.tensors])[:12].tolist()
    choices = [("all weights", counts.sum(axis=1)), *((tensors.tensors[i].name, counts[:, i]) for i in sorted(largest))]
    shares = []
    for name, table in choices:
        total = table.sum(axis=1, keepdims=True)
        known = total[:, 0] > 0
        share = table / np.where(total > 0, total, np.nan)
        z = [
            [round(float(v), 4) if ok else None for v, ok in zip(share[:, b], known, strict=True)]
            for b in range(buckets)
        ]
        shares.append((name, z))
    if not any(v for _, z in shares[:1] for row in z for v in row):
        return None
    heat = go.Heatmap(
        x=tensors.sample_step.tolist(), y=labels, z=shares[0][1], colorscale=_HEAT,
        colorbar={"title": {"text": "share"}, "thickness": 12, "tickformat": ".0%"},
        hovertemplate="|w| from %{y}, step %{x}: %{z:.1%}<extra></extra>",
    )  # fmt: skip
    buttons = [{"label": name, "method": "restyle", "args": [{"z": [z]}]} for name, z in shares]
    menu = {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "direction": "down"}
    figure = _figure(
        [heat], height=380, hovermode="closest", updatemenus=[menu], margin={"l": 64, "r": 16, "t": 44, "b": 44}
    )
    figure.update_yaxes(showgrid=False, title={"text": "|w|"})
    caption = "Share of weights by size, each row four times the one below. Healthy: a hill that moves slowly."
    return Figure("histogram", "Weights over time", caption, figure)


# -- pace and scale


def _pace(record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    duration = np.where(record.main.duration > 0, record.main.duration, np.nan)
    if not np.isfinite(duration).any():
        return None
    x, median, high = _folded(record.main, duration, np.median, np.max, points=400)
    traces = [_line(x, high, "longest", GREY, width=1), _line(x, median, "median", BLUE)]
    figure = _figure(traces, marks, yaxis_type="log", yaxis_title="seconds", height=220)
    return Figure(
        "pace", "Time of a step", "Healthy: flat. Peaks are validations, checkpoints, or a slow loader.", figure
    )


def _loss_scale(record: Record, marks: Sequence[dict[str, Any]]) -> Figure | None:
    if not np.isfinite(record.main.loss_scale).any():
        return None
    x, scale = _folded(record.main, record.main.loss_scale, np.min)
    figure = _figure([_line(x, scale, "loss scale", BLUE)], marks, yaxis_type="log", height=220)
    return Figure("loss-scale", "Loss scale of the GradScaler", "Healthy: it climbs and halves now and then.", figure)
