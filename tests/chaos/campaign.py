"""Kills trainers and agents at random instants and counts what reached the agent; writes the table of a report.

    python -m tests.chaos.campaign --trainers 200 --agents 100 --write docs/reliability.md

The trainer writes real journals through the writer of training processes, without
torch (`gradwatch.testing.JournalBuilder`). Behind every step it sends a byte
through a pipe, which survives it: so what was written is known by another way
than the journal. A step is kept if the agent's ``steps_total`` has it. A killed
trainer may have written one row more than it has told. Everything is loopback,
every wait has a deadline, and a row that lost a step makes the command fail.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress, track

from gradwatch.testing import FakeClock, JournalBuilder
from tests.agent.processes import AgentProcess, agent
from tests.services import eventually

BATCH = 20


@dataclass
class Row:
    fault: str
    tried: int
    written: int
    counted: int
    lost: int
    doubled: int
    told: list[float]

    def cells(self) -> str:
        told = f"{sorted(self.told)[len(self.told) // 2]:.1f} s, at most {max(self.told):.1f} s" if self.told else "–"
        return (
            f"| {self.fault} | {self.tried} | {self.written} | {self.counted} | {self.lost} | {self.doubled} | {told} |"
        )


class RealClock(FakeClock):
    def __call__(self) -> float:
        return time.time()

    def advance(self, seconds: float) -> None:
        time.sleep(seconds)


def trainer(root: Path, run: str, pause: float, steps: int) -> tuple[int, int]:
    """Fork a trainer; its pid and the pipe that has a byte for each step written. It waits when all are."""
    inner, outer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(inner)
            journal = JournalBuilder(root, run=run, clock=RealClock(), seconds_a_step=pause)
            for _ in range(steps):
                journal.step(loss=1.0, grad_norm=1.0, clip_threshold=2.0)
                os.write(outer, b".")
            time.sleep(300)
        finally:
            os._exit(99)
    os.close(outer)
    return pid, inner


def bytes_of(pipe: int) -> int:
    count = 0
    while chunk := os.read(pipe, 65_536):
        count += len(chunk)
    os.close(pipe)
    return count


def kill_trainers(directory: Path, tried: int, rng: random.Random) -> Row:
    row = Row("trainer: SIGKILL at a random instant", tried, 0, 0, 0, 0, [])
    directory.mkdir()
    with agent(directory) as process, Progress(disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("trainers", total=tried)
        for first in range(0, tried, BATCH):
            runs = [f"t{i}" for i in range(first, min(first + BATCH, tried))]
            alive = {run: trainer(directory, run, rng.choice([0.0005, 0.002, 0.01]), 10_000) for run in runs}
            killed_at, written = {}, {}
            for run in rng.sample(runs, len(runs)):
                time.sleep(rng.uniform(0.0, 0.2))
                pid, pipe = alive[run]
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                killed_at[run], written[run] = time.monotonic(), bytes_of(pipe)
            _settle(process, row, killed_at, written)
            progress.advance(task, len(runs))
    return row


def _settle(process: AgentProcess, row: Row, killed_at: dict[str, float], written: dict[str, int]) -> None:
    waiting = {run for run in killed_at if written[run]}
    told: dict[str, float] = {}
    until = time.monotonic() + 60
    while waiting and time.monotonic() < until:
        metrics = process.metrics()
        now = time.monotonic()
        for run in [run for run in waiting if ("state:killed", run) in metrics or ("state:abrupt", run) in metrics]:
            waiting.discard(run)
            told[run] = now - killed_at[run]
        time.sleep(0.05)
    metrics = process.metrics()
    for run, steps in written.items():
        counted = int(metrics.get(("steps_total", run), 0))
        row.written += steps
        row.counted += counted
        row.lost += max(0, steps - counted)
        row.doubled += max(0, counted - steps - 1)
    row.told += told.values()
    if waiting:
        raise SystemExit(f"no end told within 60 s: {sorted(waiting)}")


def kill_agents(directory: Path, tried: int, rng: random.Random, steps: int = 4_000) -> Row:
    row = Row("agent: SIGKILL at a random instant, started again", tried, steps, 0, 0, 0, [])
    directory.mkdir()
    pid, pipe = trainer(directory, "a", 0.04, steps)  # so slow that it trains as long as agents are killed
    try:
        for _ in track(range(tried), "agents", disable=not sys.stderr.isatty()):
            process = AgentProcess(directory)
            time.sleep(rng.uniform(0.0, 0.6))
            process.kill()
        with agent(directory) as process:
            eventually(lambda: process.metrics().get(("steps_total", "a"), 0) >= steps, "every step", seconds=120)
            row.counted = int(process.metrics()["steps_total", "a"])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    row.written = bytes_of(pipe)
    row.lost, row.doubled = max(0, row.written - row.counted), max(0, row.counted - row.written)
    return row


HEAD = """# Reliability

Written by `{command}` on {date} ({machine}). Journal-level trainers (no torch); one agent process, its
counters read over `/metrics`. A killed trainer may have written one row that it could not tell any more, so that
"counted" may exceed "told as written" by one a trial; more than that is "counted twice".

| fault | tried | told as written | counted by the agent | lost | counted twice | until the end was told (median) |
| --- | ---: | ---: | ---: | ---: | ---: | --- |
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trainers", type=int, default=200)
    parser.add_argument("--agents", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", type=Path)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        if given.trainers:
            rows.append(kill_trainers(Path(scratch) / "trainers", given.trainers, rng))
            print(rows[-1].cells(), flush=True)
        if given.agents:
            rows.append(kill_agents(Path(scratch) / "agents", given.agents, rng))
            print(rows[-1].cells(), flush=True)
    if given.write:
        command = f"python -m tests.chaos.campaign --trainers {given.trainers} --agents {given.agents}"
        machine = f"{platform.machine()}, {os.cpu_count()} shared cores, Linux"
        head = HEAD.format(command=command, date=datetime.date.today().isoformat(), machine=machine)
        given.write.write_text(head + "\n".join(row.cells() for row in rows) + "\n")
    if any(row.lost or row.doubled for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
