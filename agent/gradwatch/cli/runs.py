"""``gradwatch runs``: what is recorded below a directory, and how it does."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import numpy as np
import typer

from gradwatch.cli.locate import Recorded, recorded, root_of
from gradwatch.collect.life import Motion, told_end
from gradwatch.collect.pace import Pace
from gradwatch.collect.rows import Rows
from gradwatch.journal import JournalError, JournalReader

if TYPE_CHECKING:
    from rich.table import Table

#: The clip rate is that of this many last steps.
RECENT: Final = 1_000
_FOLLOW_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """A run in one line. None where the journal does not say; norms are pre-clip, unscaled and global."""

    run: str
    name: str
    model: str
    state: str
    attempt: int
    world_size: int
    step: int | None
    loss: float | None
    grad_norm: float | None
    #: Share of the last 1,000 steps whose norm was above the threshold; None where nothing clips.
    clip_rate: float | None
    start_time: float
    last_step_time: float | None
    directory: str


def command(
    directory: Annotated[
        Path | None,
        typer.Argument(
            help="Where the journals are; by default GRADWATCH_DIR, or where trainings write.", show_default=False
        ),
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON: a list of objects.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show it anew every second, until Ctrl-C.")] = False,
) -> None:
    """List the runs below a directory: state, steps, loss, gradient norm, clip rate.

    Reads the journals, whether an agent is there or not, and writes nothing. The norm is that of the last
    step, before clipping; the clip rate that of the last 1,000 steps.

    Examples:

        gradwatch runs
        gradwatch runs /scratch/journals --follow
        gradwatch runs --json | jq '.[] | select(.state == "running")'
    """
    root = root_of(directory)
    if json_output:
        lines, wrong = read_lines(root)
        print(json.dumps([asdict(line) for line in lines], indent=2))
        print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
        return
    from rich.console import Console

    console = Console(highlight=False)
    if not follow:
        lines, wrong = read_lines(root)
        console.print(table(lines) if lines else f"no runs in {root}", soft_wrap=not console.is_terminal)
        for message in wrong:
            console.print(f"unreadable: {message}", style="yellow", markup=False)
        from gradwatch.probe.launch import agent_address

        if address := agent_address(root):
            console.print(f"status page and /metrics: http://{address}/", markup=False)
        return
    from rich.live import Live

    try:
        with Live(console=console, auto_refresh=False) as live:
            while True:
                live.update(table(read_lines(root)[0]), refresh=True)
                time.sleep(_FOLLOW_SECONDS)
    except KeyboardInterrupt:
        return


def read_lines(root: Path) -> tuple[list[Line], list[str]]:
    """A line for each run below ``root``, newest first, and what was wrong with those that cannot be read."""
    runs, wrong = recorded(root)
    lines = []
    for run in runs:
        try:
            lines.append(read_line(run))
        except JournalError as error:
            wrong.append(str(error))
    return lines, wrong


def read_line(run: Recorded) -> Line:
    """Sum a run up from the journal of its latest attempt. Raises ``JournalError`` where that cannot be read."""
    reader = JournalReader(run.latest.path)
    try:
        rows = Rows.of(reader.last_steps(RECENT))
        # The ring is asked for one row only: what is wanted of this poll is the events, which come whole.
        ends = [event for event in reader.poll(1).events if event["kind"] == "end"]
        alive = reader.alive()
    finally:
        reader.close()
    manifest = run.manifest
    clips = bool(np.isfinite(rows["clip_threshold"]).any())
    steps = int(rows.taken.sum())
    return Line(
        run=run.run,
        name=manifest.run_name or run.run,
        model=manifest.model,
        state=_state(ends, alive, rows, manifest.start_time),
        attempt=run.latest.attempt,
        world_size=manifest.world_size,
        step=int(rows.step[-1]) if len(rows) else None,
        loss=_last(rows["loss"].tolist()),
        grad_norm=_last(rows.norm.tolist()),
        clip_rate=int(rows.clipped.sum()) / steps if clips and steps else None,
        start_time=manifest.start_time,
        last_step_time=float(rows.time[-1]) if len(rows) else None,
        directory=str(run.latest.path),
    )


def _state(ends: Sequence[dict[str, Any]], alive: bool, rows: Rows, start_time: float) -> str:
    """The state as the journal alone tells it: who is gone without a word ended abruptly."""
    if ends:
        return told_end(ends[-1]).state
    if not alive:
        return "abrupt"
    pace = Pace()
    pace.add(rows["duration"])
    motion = Motion(time.monotonic, time.time)
    motion.moved_at(float(rows.time[-1]) if len(rows) else start_time)
    return motion.state(bool(len(rows)), pace)


def _last(values: Sequence[float]) -> float | None:
    """The last finite value."""
    return next((value for value in reversed(values) if math.isfinite(value)), None)


def table(lines: Sequence[Line], now: float | None = None) -> Table:
    """The lines as a table for people; ``age`` is that of the last step."""
    from rich.table import Table
    from rich.text import Text

    now = time.time() if now is None else now
    shown = Table(box=None, pad_edge=False, header_style="dim")
    for title in ("run", "model", "state", "steps", "loss", "norm", "clip rate", "age"):
        right = title in ("steps", "loss", "norm", "clip rate", "age")
        shown.add_column(title, justify="right" if right else "left", no_wrap=True)
    for line in lines:
        shown.add_row(
            Text(line.name),
            Text(line.model),
            Text(line.state, style=_STYLES.get(line.state, "")),
            "–" if line.step is None else str(line.step + 1),
            _number(line.loss),
            _number(line.grad_norm),
            "–" if line.clip_rate is None else f"{100 * line.clip_rate:.1f} %",
            "–" if line.last_step_time is None else _age(now - line.last_step_time),
        )
    return shown


_STYLES: Final = {
    "running": "green",
    "starting": "green",
    "stalled": "yellow",
    "failed": "red",
    "killed": "red",
    "abrupt": "bold red",
}


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _age(seconds: float) -> str:
    """Seconds in the largest unit that leaves a whole number."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(0, int(seconds))} s"
