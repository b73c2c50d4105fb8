"""What the bridge does under load: webhooks at a steady rate, and polls of an MLflow with 10⁵ runs.

    python benchmarks/bridge.py            # both: 50 webhooks/s for 60 s, 100,000 runs
    python benchmarks/bridge.py --seconds 10 --runs 10000

Real parts: an MLflow server over sqlite and the bridge, each in a process of
its own, on loopback.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

TOKEN = "benchmark"
#: Series that alert: so many runs, with so many alerts each.
RUNS, NAMES = 40, 5
START = datetime(2026, 1, 31, 12, tzinfo=UTC)


# -- webhooks


def change(index: int) -> dict[str, Any]:
    """The ``index``-th change of state: each life of a series fires, and is resolved a round later."""
    series = RUNS * NAMES
    firing, life = index // series % 2 == 0, index // (2 * series)
    number = index % series
    starts = START + timedelta(minutes=life)
    return {
        "status": "firing" if firing else "resolved",
        "labels": {"alertname": f"Load{number // RUNS}", "run": f"load-{number % RUNS}"},
        "annotations": {"summary": "made up"},
        "startsAt": starts.isoformat(),
        "endsAt": (starts + timedelta(seconds=30)).isoformat(),
        "fingerprint": f"{number:016x}",
    }


@dataclass
class Sent:
    """How the sending went."""

    changes: int
    #: Seconds from each post to its 200, tries included.
    waits: list[float]
    retries: int
    seconds: float


async def send(url: str, rate: float, seconds: float, deadline: float = 120.0) -> Sent:
    """Post each change at its time, and again after a 503 or a connection that broke, as Alertmanager does."""
    import httpx

    sent = Sent(int(rate * seconds), [], 0, 0.0)
    limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
    async with httpx.AsyncClient(limits=limits, timeout=deadline, headers={"Authorization": f"Bearer {TOKEN}"}) as c:

        async def one(index: int) -> None:
            began = time.monotonic()
            while True:
                try:
                    answer = await c.post(url, json={"version": "4", "alerts": [change(index)]})
                except httpx.TransportError:
                    sent.retries += 1
                    assert time.monotonic() < began + deadline, "the bridge is gone"
                    await asyncio.sleep(0.5)
                    continue
                if answer.status_code == 200:
                    assert answer.json()["unknown"] == answer.json()["refused"] == 0, answer.text
                    break
                assert answer.status_code == 503, answer.text
                sent.retries += 1
                await asyncio.sleep(0.5)
            sent.waits.append(time.monotonic() - began)

        began = time.monotonic()
        tasks = []
        for index in range(sent.changes):
            await asyncio.sleep(max(0.0, began + index / rate - time.monotonic()))
            tasks.append(asyncio.create_task(one(index)))
        await asyncio.gather(*tasks)
        sent.seconds = time.monotonic() - began
    return sent


def lost(changes: int, artifacts: Path, tags: dict[str, dict[str, str]]) -> list[str]:
    """Changes of state that stand nowhere: in the artifact of each life, and in the tag of each series."""
    last: dict[tuple[str, str], dict[str, Any]] = {}
    newest: dict[str, dict[str, Any]] = {}
    for index in range(changes):
        told = change(index)
        last[told["fingerprint"], told["startsAt"]] = newest[told["fingerprint"]] = told
    written = {}
    for file in artifacts.rglob("alerts/*.json"):
        document = json.loads(file.read_text())
        written[document["fingerprint"], datetime.fromisoformat(document["startsAt"])] = document["status"]
    problems = [
        f"artifact of {fingerprint} {starts}: {written.get((fingerprint, datetime.fromisoformat(starts)))}"
        for (fingerprint, starts), told in last.items()
        if written.get((fingerprint, datetime.fromisoformat(starts))) != told["status"]
    ]
    for told in newest.values():
        text = tags[told["labels"]["run"]].get(f"gradwatch.alert.{told['labels']['alertname']}", "")
        starts = told["startsAt"].replace("+00:00", ".000Z")
        begins = f"firing since {starts}" if told["status"] == "firing" else f"resolved {starts}"
        if not text.startswith(begins):
            problems.append(f"tag of {told['labels']}: {text!r} and not {begins!r}")
    return problems


def make_runs(url: str) -> dict[str, str]:
    """MLflow's id by run."""
    from mlflow import MlflowClient

    client = MlflowClient(url)
    experiment = client.create_experiment("load")
    made = {}
    for number in range(RUNS):
        tags = {"gradwatch.run": f"load-{number}", "gradwatch.model": "load", "gradwatch.step": str(number)}
        made[f"load-{number}"] = client.create_run(experiment, tags=tags).info.run_id
    return made


def tags_of(url: str, runs: dict[str, str]) -> dict[str, dict[str, str]]:
    from mlflow import MlflowClient

    client = MlflowClient(url)
    return {run: dict(client.get_run(run_id).data.tags) for run, run_id in runs.items()}


def bench_webhooks(rate: float, seconds: float) -> None:
    with tempfile.TemporaryDirectory() as place, mlflow_server(Path(place)) as url:
        runs = make_runs(url)
        with bridge_process(Path(place), url) as bridge:
            sent = asyncio.run(send(f"{bridge}/webhooks/alertmanager", rate, seconds))
        problems = lost(sent.changes, Path(place) / "artifacts", tags_of(url, runs))
    waits = sorted(sent.waits)
    print(f"webhooks: {sent.changes} changes of state at {rate:g}/s; all answered after {sent.seconds:.1f} s")
    print(
        f"  wait for the answer: p50 {statistics.median(waits) * 1e3:.0f} ms, "
        f"p99 {waits[int(len(waits) * 0.99)] * 1e3:.0f} ms, longest {waits[-1] * 1e3:.0f} ms; {sent.retries} retries"
    )
    print(f"  lost changes of state: {len(problems)}")
    for problem in problems[:5]:
        print(f"    {problem}")
    if problems:
        sys.exit(1)


# -- polls


def fill(database: Path, runs: int, running: int = 50, days: float = 29.0) -> None:
    """Put runs into MLflow's sqlite file by SQL: ended over ``days``, and ``running`` that beat."""
    now = time.time()
    connection = sqlite3.connect(database)
    connection.execute("PRAGMA synchronous = OFF")
    experiment = connection.execute("SELECT min(experiment_id) FROM experiments").fetchone()[0]
    ids = [f"{index:032x}" for index in range(runs)]

    def rows(index: int) -> tuple[Any, ...]:
        live = index < running
        start = now - 3600 - days * 86_400 * index / runs
        status, end = (
            ("RUNNING", None) if live else (("FINISHED", "FAILED")[index % 10 == 0], int((start + 1800) * 1000))
        )
        return ids[index], f"run {index}", "LOCAL", "bench", status, int(start * 1000), end, "active", experiment

    columns = "run_uuid, name, source_type, user_id, status, start_time, end_time, lifecycle_stage, experiment_id"
    connection.executemany(f"INSERT INTO runs ({columns}) VALUES (?,?,?,?,?,?,?,?,?)", map(rows, range(runs)))

    def tags() -> Iterator[tuple[str, str, str]]:
        for index, run_id in enumerate(ids):
            state = "running" if index < running else ("finished", "failed")[index % 10 == 0]
            for key, value in (
                ("run", f"bench-{index}"), ("model", f"model-{index % 50}"), ("tier", "production"),
                ("state", state), ("step", "1000"), ("heartbeat", str(int(now))), ("attempt", "0"),
            ):  # fmt: skip
                yield f"gradwatch.{key}", value, run_id

    connection.executemany("INSERT INTO tags (key, value, run_uuid) VALUES (?,?,?)", tags())
    params = [
        ("group.default.0.lr", "0.001"), ("group.default.0.weight_decay", "0.01"), ("optimizer.default.class", "AdamW"),
        ("scheduler.class", "CosineAnnealingLR"), ("config.batch_size", "64"), ("max_norm", "1.0"), ("seed", "1"),
        ("git.commit", "0" * 40), ("precision.training", "float32"), ("machine.torch", "2.13.0"),
    ]  # fmt: skip
    connection.executemany(
        "INSERT INTO params (key, value, run_uuid) VALUES (?,?,?)",
        ((f"gradwatch.{key}", value, run_id) for run_id in ids for key, value in params),
    )
    metrics = ("loss_mean", "grad_norm_mean", "grad_norm_max", "clip_rate", "validation/loss", "validation/accuracy")
    connection.executemany(
        "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) VALUES (?,?,?,?,0,?)",
        ((f"gradwatch/{key}", 0.5, int(now * 1000), 1000, run_id) for run_id in ids for key in metrics),
    )
    connection.commit()
    connection.close()


def bench_polls(runs: int, steady: int = 20) -> None:
    from gradwatch.bridge.service import Bridge, Settings

    with tempfile.TemporaryDirectory() as place:
        with mlflow_server(Path(place)):
            pass  # makes the tables
        began = time.monotonic()
        fill(Path(place) / "mlflow.db", runs)
        print(f"polls: {runs} runs put into sqlite in {time.monotonic() - began:.0f} s")
        with mlflow_server(Path(place)) as url:
            settings = Settings(url)
            bridge = Bridge(settings)
            first: list[float] = []
            while not bridge.runs.runs.complete:
                first.append(poll(bridge))
            later = [poll(bridge) for _ in range(steady)]
            known, memory = len(bridge.runs.runs.ended), resident()
            scrape = time.monotonic()
            page, _ = bridge.exposition.render()
            scrape = time.monotonic() - scrape
    budget = settings.poll_budget
    print(f"  budget: no further page after {budget:g} s, of a poll every {settings.interval:g} s")
    print(f"  first round: {len(first)} polls, longest {max(first):.1f} s; {known} ended runs known, {memory:.0f} MiB")
    print(f"  then: median {statistics.median(later):.2f} s, longest {max(later):.2f} s")
    print(f"  scrape: {scrape * 1e3:.0f} ms, {len(page) >> 10} KiB")


def poll(bridge: Any) -> float:
    began = time.monotonic()
    bridge.poll()
    assert bridge.ready, bridge.trouble
    return time.monotonic() - began


def resident() -> float:
    """MiB that this process, client and bridge in one, holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


# -- processes


@contextmanager
def mlflow_server(place: Path) -> Iterator[str]:
    port = free_port()
    arguments = [
        "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{place / 'mlflow.db'}", "--artifacts-destination", str(place / "artifacts"),
    ]  # fmt: skip
    # Its runners of background jobs are seven more processes, of which nothing is asked here.
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    with process(arguments, place / "mlflow.log", f"http://127.0.0.1:{port}", "/health") as url:
        yield url


@contextmanager
def bridge_process(place: Path, mlflow: str) -> Iterator[str]:
    port = free_port()
    os.environ["GRADWATCH_BRIDGE_WEBHOOK_TOKEN"] = TOKEN
    arguments = ["-m", "gradwatch", "bridge", "--mlflow", mlflow, "--listen", f"127.0.0.1:{port}"]
    with process(arguments, place / "bridge.log", f"http://127.0.0.1:{port}", "/readyz") as url:
        yield url


@contextmanager
def process(arguments: list[str], log: Path, url: str, ready: str) -> Iterator[str]:
    with log.open("wb") as output:
        handle = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not answers(url + ready):
            if handle.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield url
    finally:
        handle.terminate()
        try:
            handle.wait(30)
        except subprocess.TimeoutExpired:
            handle.kill()
            handle.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description="What the bridge does under load.")
    parser.add_argument("--rate", type=float, default=50.0, help="webhooks a second")
    parser.add_argument("--seconds", type=float, default=60.0, help="for so long; 0 leaves them out")
    parser.add_argument("--runs", type=int, default=100_000, help="runs in MLflow; 0 leaves polls out")
    options = parser.parse_args()
    if options.seconds:
        bench_webhooks(options.rate, options.seconds)
    if options.runs:
        bench_polls(options.runs)


if __name__ == "__main__":
    main()
