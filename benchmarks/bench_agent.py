"""What the agent costs: memory over a long run, CPU beside many ranks, a scrape, and how soon a step is seen.

    python benchmarks/bench_agent.py [--quick] [memory] [mlflow] [cpu] [detect] [scrape] [latency] [upload]

The agent runs as the process that it is; journals are written by another one,
as a training does, without the training. Limits are printed beside what was
measured; nothing fails here.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "agent")]

from gradwatch.detect.ledger import Ledger  # noqa: E402
from gradwatch.sinks.prometheus import Exposition, Snapshot  # noqa: E402
from gradwatch.testing import FakeClock, JournalBuilder  # noqa: E402

_TICKS = os.sysconf("SC_CLK_TCK")


class WallClock(FakeClock):
    def __call__(self) -> float:
        return time.time()

    def advance(self, seconds: float) -> None:
        """Rows carry the time at which they were written."""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "agent")])}


@contextmanager
def agent(root: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    command = [sys.executable, "-m", "gradwatch", "agent", "--dir", str(root), "--listen", "127.0.0.1:0", *options]
    with (root.parent / "agent.log").open("wb") as log:
        handle = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
    try:
        address = None
        while address is None:
            time.sleep(0.05)
            assert handle.poll() is None, (root.parent / "agent.log").read_text()
            try:
                document = json.loads((root / ".agent" / "agent.json").read_text())
                address = document["address"] or None
                urllib.request.urlopen(f"http://{address}/healthz", timeout=5).close()
            except (OSError, ValueError):
                address = None
        yield handle, address
    finally:
        handle.terminate()
        try:
            handle.wait(40)
        except subprocess.TimeoutExpired:
            handle.kill()
            handle.wait()


def resident(pid: int) -> float:
    """Resident memory in MB (10^6 bytes)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def value(address: str, series: str) -> float:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(f"{series}{{"):
                return float(line.rpartition(" ")[2])
    return math.nan


def write(root: Path, ranks: int, tensors: int, rate: float, seconds: float) -> None:
    """The writing process: ``rate`` steps a second on each of ``ranks``, in batches of 10 ms."""
    names = [f"layer{i}.weight" for i in range(tensors)]
    journals = [
        JournalBuilder(root, rank=r, world_size=ranks, tensors=names, clock=WallClock(), capacity=32 * 2**20)
        for r in range(ranks)
    ]
    began = time.perf_counter()
    written = 0
    while (elapsed := time.perf_counter() - began) < seconds:
        due = int(elapsed * rate)
        for _ in range(due - written):
            for journal in journals:
                journal.step(loss=1.0, grad_norm=1.0 + written % 7, clip_threshold=6.5, duration=1 / rate, samples=32)
            written += 1
        time.sleep(0.01)
    for journal in journals:
        journal.end()
    print(written, flush=True)


def writer(root: Path, ranks: int, tensors: int, rate: float, seconds: float) -> subprocess.Popen[str]:
    arguments = [str(v) for v in (root, ranks, tensors, rate, seconds)]
    command = [sys.executable, __file__, "--write", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())


def memory(directory: Path, seconds: float, rate: float, mlflow: str | None) -> None:
    root = directory / "journals"
    root.mkdir()
    options = [] if mlflow is None else ["--mlflow", mlflow]
    with agent(root, *options) as (handle, address):
        training = writer(root, 1, 6, rate, seconds)
        points = []
        began = time.monotonic()
        while training.poll() is None:
            time.sleep(seconds / 20)
            points.append((time.monotonic() - began, resident(handle.pid)))
        assert training.stdout is not None
        written = int(training.stdout.read())
        time.sleep(3)
        seen = value(address, "gradwatch_steps_total")
        missed = value(address, "gradwatch_journal_rows_missed_total")
        first, last = points[len(points) // 5][1], resident(handle.pid)
        limit = 60 if mlflow is None else 220
        name = "without MLflow" if mlflow is None else "with MLflow (HTTP)"
        print(
            f"memory {name}: {last:.1f} MB resident after {written:,} steps (limit {limit}); at a fifth of them "
            f"{first:.1f} MB; growth {last - first:+.1f} MB; steps counted {seen:,.0f}, missed {missed:,.0f}"
        )


def cpu(directory: Path, seconds: float) -> None:
    root = directory / "journals"
    root.mkdir()
    with agent(root) as (handle, address):
        training = writer(root, 16, 100, 200.0, seconds + 6)
        time.sleep(4)
        begin, at = cpu_seconds(handle.pid), time.monotonic()
        time.sleep(seconds)
        share = (cpu_seconds(handle.pid) - begin) / (time.monotonic() - at)
        out, _ = training.communicate()
        time.sleep(3)
        seen, missed = value(address, "gradwatch_steps_total"), value(address, "gradwatch_journal_rows_missed_total")
        print(
            f"cpu: {share:.0%} of one core beside 16 ranks × 200 steps/s × 100 tensors (limit 100 %); "
            f"steps counted {seen:,.0f} of {int(out):,}, missed {missed:,.0f}; {resident(handle.pid):.1f} MB resident"
        )


def detect(directory: Path, seconds: float) -> None:
    """In this process: what the detectors alone cost beside 16 ranks × 200 steps/s × 100 tensors, polled as the
    agent does, four times a second."""
    from gradwatch.collect.run import RunTail
    from gradwatch.journal import find_attempts

    root, clock, chance = directory / "journals", FakeClock(), random.Random(0)
    names = [f"layer{i}.weight" for i in range(100)]
    ranks = [
        JournalBuilder(root, rank=r, world_size=16, tensors=names, clock=clock, seconds_a_step=0.0) for r in range(16)
    ]
    run, ledger = RunTail("run-1", monotonic=clock, wall=clock), Ledger()
    for place in find_attempts(root):
        run.offer(place)
    spent = {"polls": 0.0, "detectors": 0.0}
    detectors: dict[str, float] = {}
    for step in range(int(200 * seconds)):
        norm = chance.lognormvariate(0.0, 0.4)
        for journal in ranks:
            journal.step(loss=1.0 + 1.0 / (1 + step / 500) + 0.1 * norm, grad_norm=norm, clip_threshold=2.0)
            if step % 100 == 0:
                journal.sample([1.0] * 100, [0.001] * 100)
        if step % 1_000 == 999:
            ranks[0].validation(loss=1.1, accuracy=0.9, train={"loss": 1.0})
        clock.advance(1 / 200)
        if step % 50 == 49:
            began = time.process_time()
            observations = run.poll()
            spent["polls"] += time.process_time() - began
            for seen in observations:
                for detector in ledger._detectors:
                    began = time.process_time()
                    detector.observe(seen)
                    took = time.process_time() - began
                    name = type(detector).__name__
                    detectors[name] = detectors.get(name, 0.0) + took
                    spent["detectors"] += took
    for journal in ranks:
        journal.end()
    dearest = ", ".join(
        f"{name} {took / seconds:.2%}" for name, took in sorted(detectors.items(), key=lambda item: -item[1])[:4]
    )
    print(
        f"detect: {spent['detectors'] / seconds:.1%} of one core for all detectors beside 16 ranks × 200 steps/s "
        f"(limit 10 %), {spent['polls'] / seconds:.1%} for reading and folding; dearest: {dearest}"
    )


def scrape(directory: Path, repeats: int) -> None:
    """In this process: 5,000 series of some twenty runs, as text."""
    from gradwatch.collect.run import RunTail
    from gradwatch.journal import find_attempts

    root = directory / "journals"
    clock = FakeClock()
    runs = []
    series = 0
    exposition = Exposition(lambda: Snapshot([(run, Ledger()) for run in runs]))
    while series < 5_000:
        name = f"run-{len(runs)}"
        tensors = [f"layer{i}.weight" for i in range(30)]
        with JournalBuilder(root, run=name, tensors=tensors, clock=clock) as journal:
            for i in range(1_000):
                journal.step(loss=1.0, grad_norm=1.0 + i % 7, clip_threshold=6.5)
            journal.sample([1.0] * 30, [0.1] * 30)
        run = RunTail(name, monotonic=clock, wall=clock)
        for place in find_attempts(root):
            if place.run == name:
                run.offer(place)
        while not run.ended:
            run.poll()
        runs.append(run)
        series = sum(not line.startswith(b"#") for line in exposition.render()[0].splitlines())
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        exposition.render()
        times.append(time.perf_counter() - began)
    quartiles = statistics.quantiles(times, n=4)
    print(
        f"scrape: {series:,} series of {len(runs)} runs in {1e3 * quartiles[1]:.1f} ms "
        f"(quartiles {1e3 * quartiles[0]:.1f} to {1e3 * quartiles[2]:.1f}; limit 50)"
    )


def latency(directory: Path, count: int) -> None:
    """From the writing of a row, the newest of its run, to the scrape that shows it."""
    root = directory / "journals"
    root.mkdir()
    with agent(root) as (_, address):
        journal = JournalBuilder(root, clock=WallClock())
        journal.step()
        time.sleep(2)
        times = []
        for i in range(1, count + 1):
            time.sleep(1.0 + (i * 0.37) % 0.25)
            began = time.perf_counter()
            journal.step()
            while value(address, "gradwatch_step") < i:
                time.sleep(0.01)
            times.append(time.perf_counter() - began)
        journal.end()
        print(
            f"latency: a step is in /metrics after {1e3 * statistics.median(times):.0f} ms (median of {count}), "
            f"at most {1e3 * max(times):.0f} ms (limit 1,000)"
        )


def upload(directory: Path, mlflow: str, count: int) -> None:
    """From the writing of a window's last row to the answer of an MLflow server that holds the window."""
    from mlflow import MlflowClient

    root = directory / "journals"
    root.mkdir()
    client = MlflowClient(mlflow)
    with agent(root, "--mlflow", mlflow) as _:
        journal = JournalBuilder(root, clock=WallClock())
        times = []

        def run_id() -> str | None:
            found = client.search_runs([e.experiment_id for e in client.search_experiments()])
            return str(found[0].info.run_id) if found else None

        def uploaded() -> int:
            point = client.get_run(run).data.metrics.get("gradwatch/grad_norm_last")
            return -1 if point is None else int(point)

        journal.step(grad_norm=0.0, loss=1.0)
        while (run := run_id()) is None:
            time.sleep(0.1)
        for end in range(10, 10 * (count + 4), 10):
            # At this pace windows are of ten steps, and the norm tells which step it was. A window is complete when
            # the step behind it is there: until then its last row may still get its loss.
            began = 0.0
            for step in range(end - 9, end + 1):
                began = time.perf_counter() if step == end - 1 else began
                journal.step(grad_norm=float(step), loss=1.0)
                time.sleep(0.15 if step < end else 0.0)
            while uploaded() < end - 1:
                time.sleep(0.02)
            times.append(time.perf_counter() - began)
        journal.end()
        # The first windows also make the run and its parameters.
        times = times[3:]
        print(
            f"upload: the last step of a window is in MLflow after {statistics.median(times):.2f} s "
            f"(median of {count}), at most {max(times):.2f} s (limit 5 s; a step each 0.15 s)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the time")
    parser.add_argument("--write", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("parts", nargs="*", default=[])
    chosen = parser.parse_args()
    if chosen.write:
        root, ranks, tensors, rate, seconds = chosen.write
        write(Path(root), int(ranks), int(tensors), float(rate), float(seconds))
        return
    parts = chosen.parts or ["memory", "mlflow", "cpu", "detect", "scrape", "latency", "upload"]
    scale = 0.1 if chosen.quick else 1.0
    for part in parts:
        with tempfile.TemporaryDirectory(prefix="gradwatch-bench-") as name:
            directory = Path(name)
            if part == "memory":
                memory(directory, 125 * scale, 8_000, None)
            elif part in ("mlflow", "upload"):
                from tests.services import MlflowServer

                with MlflowServer(directory / "mlflow") as server:
                    if part == "mlflow":
                        memory(directory, 125 * scale, 8_000, server.url)
                    else:
                        upload(directory, server.url, max(5, int(30 * scale)))
            elif part == "cpu":
                cpu(directory, max(8.0, 30 * scale))
            elif part == "detect":
                detect(directory, max(20, 120 * scale))
            elif part == "scrape":
                scrape(directory, 50)
            elif part == "latency":
                latency(directory, max(8, int(30 * scale)))
            else:
                parser.error(f"no part {part!r}")


if __name__ == "__main__":
    main()
