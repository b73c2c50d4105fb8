"""Figures of tensors: their norms and update ratios over the steps, and the sizes of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped]

from gradwatch.tools.report.drawing import BLUE, HEAT, ORANGE, Figure, drawn, line, number
from gradwatch.tools.report.record import Tensors

#: Columns of a heatmap at most, and rows: of more tensors those with the largest norms.
COLUMNS: Final = 200
LAYERS: Final = 40


def by_tensor(tensors: Tensors) -> list[Figure | None]:
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
        colorscale=HEAT,
        colorbar={"title": {"text": "log10"}, "thickness": 12},
        hovertemplate="%{y}<br>step %{x}: 1e%{z}<extra></extra>",
    )
    left = min(8 + 7 * max(len(names[i]) for i in shown), 260)
    layout: dict[str, Any] = {
        "margin": {"l": left, "r": 16, "t": 8, "b": 44},
        "height": 90 + 18 * len(shown),
        "hovermode": "closest",
    }
    figure = drawn([heat], **layout)
    figure.update_yaxes(autorange="reversed", showgrid=False, ticklabelstep=1)
    rest = f" The {LAYERS} largest of {len(names)}." if len(names) > LAYERS else ""
    return Figure(name, title, caption + rest, figure)


def _mean(values: Any) -> Any:
    """Mean over the first axis of what is known."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)


def weights(tensors: Tensors, marks: Sequence[dict[str, Any]]) -> Figure | None:
    traces = []
    for values, name, colour, axis in (
        (tensors.global_weight_norm, "weight norm", BLUE, "y"),
        (tensors.global_update_ratio, "update ratio", ORANGE, "y2"),
    ):
        if np.isfinite(values).any():
            y = [number(v) if np.isfinite(v) else None for v in values]
            traces.append(line(tensors.sample_step.tolist(), y, name, colour, mode="lines+markers", yaxis=axis))
    if not traces:
        return None
    second = {"overlaying": "y", "side": "right", "type": "log", "exponentformat": "power", "showgrid": False}
    layout: dict[str, Any] = {"yaxis2": second, "height": 260, "margin": {"l": 64, "r": 64, "t": 8, "b": 44}}
    caption = "Of all weights, at sampled steps. Healthy: the norm settles, the ratio stays near 1e-3."
    return Figure("weights", "Weight norm and update ratio", caption, drawn(traces, marks, **layout))


def histogram(tensors: Tensors) -> Figure | None:
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
        x=tensors.sample_step.tolist(), y=labels, z=shares[0][1], colorscale=HEAT,
        colorbar={"title": {"text": "share"}, "thickness": 12, "tickformat": ".0%"},
        hovertemplate="|w| from %{y}, step %{x}: %{z:.1%}<extra></extra>",
    )  # fmt: skip
    buttons = [{"label": name, "method": "restyle", "args": [{"z": [z]}]} for name, z in shares]
    menu = {"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom", "direction": "down"}
    figure = drawn(
        [heat], height=380, hovermode="closest", updatemenus=[menu], margin={"l": 64, "r": 16, "t": 44, "b": 44}
    )
    figure.update_yaxes(showgrid=False, title={"text": "|w|"})
    caption = "Share of weights by size, each row four times the one below. Healthy: a hill that moves slowly."
    return Figure("histogram", "Weights over time", caption, figure)
