"""What figures are drawn with: folds that bound their size, lines, bands, marks, and the colours of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import plotly.graph_objects as go  # type: ignore[import-untyped]

from gradwatch.collect.rows import F64
from gradwatch.tools.report.record import Steps

#: Points of a curve at most: what a wide screen shows.
POINTS: Final = 800
BLUE, ORANGE, RED, GREEN, GREY = "#3b82c4", "#d97a1e", "#c8403a", "#3d9a5b", "#8a93a0"
LINES: Final = (BLUE, ORANGE, GREEN, "#8f6cc4", "#b08a2e", GREY)
HEAT: Final = "Viridis"


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure with what stands above it: a title, and what healthy looks like."""

    name: str
    title: str
    caption: str
    figure: go.Figure


def chunks(steps: Steps, points: int = POINTS) -> Iterator[slice | None]:
    """Consecutive rows in at most about ``points`` pieces, None between two attempts."""
    size = max(-(-len(steps) // points), 1)
    edges = np.flatnonzero(np.diff(steps.attempt)) + 1
    starts = [0, *edges.tolist()]
    for start, stop in zip(starts, [*starts[1:], len(steps)], strict=True):
        if start:
            yield None
        for at in range(start, stop, size):
            yield slice(at, min(at + size, stop))


def folded(steps: Steps, values: F64, *how: Callable[[F64], Any], points: int = POINTS) -> list[list[Any]]:
    """Steps, and what each of ``how`` makes of the finite values of each piece; None where there are none."""
    columns: list[list[Any]] = [[] for _ in range(1 + len(how))]
    for chunk in chunks(steps, points):
        piece = np.empty(0) if chunk is None else values[chunk]
        piece = piece[np.isfinite(piece)]
        columns[0].append(None if chunk is None else int(steps.step[chunk][-1]))
        for column, fold in zip(columns[1:], how, strict=True):
            column.append(number(fold(piece)) if len(piece) else None)
    return columns


def number(value: Any) -> float:
    """Five digits are more than a screen shows."""
    return float(f"{float(value):.5g}")


def line(x: Sequence[Any], y: Sequence[Any], name: str, colour: str, **more: Any) -> go.Scatter:
    line = {"color": colour, "width": more.pop("width", 1.6), **({"dash": more.pop("dash")} if "dash" in more else {})}
    return go.Scatter(x=list(x), y=list(y), name=name, mode=more.pop("mode", "lines"), line=line, **more)


def band(x: Sequence[Any], low: Sequence[Any], high: Sequence[Any], name: str, colour: str) -> list[go.Scatter]:
    """The area between two curves."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    shared: dict[str, Any] = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    return [
        go.Scatter(x=list(x), y=list(low), showlegend=False, **shared),
        go.Scatter(
            x=list(x), y=list(high), name=name, fill="tonexty", fillcolor=f"rgba({red},{green},{blue},0.18)", **shared
        ),
    ]


def drawn(traces: Sequence[Any], marks: Sequence[dict[str, Any]] = (), **layout: Any) -> go.Figure:
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
        annotations=[flag(mark) for mark in marks if mark.get("text")],
    )
    figure.update_layout(**layout)
    return figure


def mark(step: int, text: str, colour: str, dash: str) -> dict[str, Any]:
    """A vertical line through a figure, with a word at its head."""
    line = {"color": colour, "width": 1, "dash": dash}
    return {
        "type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1,
        "line": line, "text": text,
    }  # fmt: skip


def flag(mark: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "x": mark["x0"], "y": 1, "xref": "x", "yref": "paper", "text": mark["text"], "showarrow": False,
        "textangle": -90, "xanchor": "right", "yanchor": "top", "font": {"size": 10, "color": mark["line"]["color"]},
    }  # fmt: skip
