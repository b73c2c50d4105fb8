"""What the demo's terminal shows: numbers from the agent's ``/metrics``, and the norm of every step.

Numbers are read where Prometheus would read them. The curve is read from the journal, since a scrape sees a
gauge now and then and would miss the spike in between.
"""

from __future__ import annotations

import math
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from gradwatch.catalog import PREFIX
from gradwatch.journal import JournalError, JournalReader

#: Columns of the curve of norms.
CURVE: Final = 46
_BARS: Final = "▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Numbers:
    """What ``/metrics`` says of one run; NaN where it says nothing (yet)."""

    step: float = math.nan
    steps: float = 0.0
    clipped: float = 0.0
    loss: float = math.nan
    norm: float = math.nan
    p50: float = math.nan
    p99: float = math.nan
    threshold: float = math.nan
    scores: dict[str, float] = field(default_factory=dict)
    validation_loss: float = math.nan
    gap: float = math.nan
    state: str = "starting"
    run_name: str = ""
    findings: dict[str, int] = field(default_factory=dict)

    @property
    def clip_rate(self) -> float:
        """Clipped steps over steps, of the whole run."""
        return self.clipped / self.steps if self.steps else math.nan


def read_metrics(text: str, run: str) -> Numbers:
    """Pick the numbers of ``run`` out of an exposition."""
    numbers = Numbers()
    plain = {
        "step": "step",
        "steps_total": "steps",
        "clipped_steps_total": "clipped",
        "grad_norm": "norm",
        "clip_threshold": "threshold",
    }
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels, value = sample.labels, float(sample.value)
            name = sample.name.removeprefix(PREFIX)
            if labels.get("run") != run:
                continue
            if name in plain:
                setattr(numbers, plain[name], value)
            elif name == "grad_norm_q" and labels["q"] in ("0.5", "0.99"):
                setattr(numbers, "p50" if labels["q"] == "0.5" else "p99", value)
            elif name == "loss" and not labels.get("slice"):
                setattr(numbers, "loss" if labels["split"] == "train" else "validation_loss", value)
            elif name == "score" and labels.get("split") != "train" and not labels.get("slice"):
                numbers.scores[labels["name"]] = value
            elif name == "generalization_gap" and labels["metric"] == "loss" and not labels.get("slice"):
                numbers.gap = value
            elif name == "run_state" and value == 1:
                numbers.state = labels["state"]
            elif name == "run_info":
                numbers.run_name = labels.get("run_name", "")
            elif name == "findings_total" and value:
                code = labels["code"]
                numbers.findings[code] = numbers.findings.get(code, 0) + int(value)
    return numbers


def scrape(url: str, run: str) -> Numbers | None:
    """One scrape of ``url``; None where nobody answers (yet)."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return read_metrics(answer.read().decode(), run)
    except (urllib.error.URLError, OSError, ValueError):
        return None


class Curve:
    """The largest pre-clip norm in each of ``CURVE`` equal parts of the run, as the journal fills."""

    def __init__(self, directory: Path, steps: int) -> None:
        self.largest: npt.NDArray[np.float64] = np.full(CURVE, np.nan)
        self._directory = directory
        self._steps = steps
        self._reader: JournalReader | None = None

    def update(self) -> None:
        """Read what has come; before the journal exists, nothing."""
        try:
            if self._reader is None:
                self._reader = JournalReader(self._directory)
            more = True
            while more:
                polled = self._reader.poll()
                part = np.minimum(polled.steps.step * CURVE // self._steps, CURVE - 1)
                np.fmax.at(self.largest, part, polled.steps["grad_norm"])
                more = polled.more
        except JournalError:
            return

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def render(self, threshold: float) -> Text:
        """Bars on a logarithmic scale; red where a norm stands ten times above the threshold."""
        text = Text()
        known = self.largest[np.isfinite(self.largest) & (self.largest > 0)]
        if not len(known):
            return text
        low, high = math.log(known.min()), math.log(max(known.max(), 10 * known.min()))
        for value in self.largest:
            if not value > 0 or not math.isfinite(value):
                text.append(" ")
                continue
            bar = _BARS[round((math.log(value) - low) / (high - low) * (len(_BARS) - 1))]
            spike = math.isfinite(threshold) and value > 10 * threshold
            text.append(bar, style="bold red" if spike else "cyan")
        return text


def render(numbers: Numbers, curve: Curve, steps: int, where: str) -> RenderableType:
    """The panel: progress, curve, numbers, and where they can be fetched."""
    done = 0 if math.isnan(numbers.step) else min(steps, int(numbers.step) + 1)
    progress, table = _grid(), _grid()
    bar = ProgressBar(total=steps, completed=done, width=CURVE, complete_style="cyan", finished_style="green")
    progress.add_row("steps", bar, f"{done}/{steps}")
    progress.add_row("norm", curve.render(numbers.threshold), "log scale")
    scores = "".join(f", {name} {_number(value)}" for name, value in numbers.scores.items())
    for label, value, beside in (
        ("loss", _number(numbers.loss), f"validation {_number(numbers.validation_loss)}{scores}"),
        ("gap", _percent(numbers.gap, sign=True), "of the loss, positive when validation is worse"),
        ("gradient norm", _number(numbers.norm), f"p50 {_number(numbers.p50)}, p99 {_number(numbers.p99)}"),
        ("clip rate", _percent(numbers.clip_rate), f"threshold {_number(numbers.threshold)}"),
        ("findings", str(sum(numbers.findings.values())), _listed(numbers.findings)),
    ):
        table.add_row(label, Text(value, style="bold"), beside)
    title = " · ".join(part for part in ("gradwatch demo", "churn-lstm", numbers.run_name, numbers.state) if part)
    return Panel(Group(progress, Text(), table), title=title, subtitle=where, padding=(1, 2), expand=False)


def _grid() -> Table:
    """Rows of a label, what it labels, and what stands beside it."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", min_width=13)
    grid.add_column(min_width=8)
    grid.add_column(style="dim")
    return grid


def line(numbers: Numbers, steps: int) -> str:
    """The same in one line, for a log."""
    return (
        f"step {_step(numbers.step)}/{steps}  loss {_number(numbers.loss)}  "
        f"norm p50 {_number(numbers.p50)} p99 {_number(numbers.p99)}  "
        f"clip rate {_percent(numbers.clip_rate)}  gap {_percent(numbers.gap, sign=True)}"
    )


def _listed(findings: dict[str, int]) -> str:
    parts: Sequence[str] = [f"{code} ×{count}" for code, count in sorted(findings.items())]
    return ", ".join(parts)


def _step(value: float) -> str:
    return "–" if math.isnan(value) else str(int(value) + 1)


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3g}"


def _percent(value: float, sign: bool = False) -> str:
    return "–" if math.isnan(value) else f"{100 * value:{'+' if sign else ''}.1f} %"
