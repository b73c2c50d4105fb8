"""``gradwatch demo --headless`` end to end: a training, the agent, ``/metrics`` meanwhile, MLflow afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gradwatch.demo.train import corrupt_steps
from gradwatch.journal import JournalReader, StepRows, find_attempts
from tests.services import eventually, fetch, free_port

#: One worker runs them all, so that one demo serves them.
pytestmark = pytest.mark.xdist_group("demo")
STEPS = 300


@dataclass(slots=True)
class Demo:
    """A demo that was played: what it printed, what it left, and an exposition from the middle of it."""

    directory: Path
    taken_port: int
    output: str
    exit_code: int
    exposition: str

    @property
    def rows(self) -> StepRows:
        """Every row of its journal."""
        [place] = find_attempts(self.directory / "gradwatch-demo/journals")
        reader = JournalReader(place.path)
        rows = reader.last_steps(STEPS + 1)
        reader.close()
        return rows


@contextmanager
def started(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``gradwatch demo --headless`` as a process, in a session of its own; ended with the block."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "gradwatch", "demo", "--headless", *arguments],
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """One demo for all tests here; its port is taken, so that it has to find another."""
    directory = tmp_path_factory.mktemp("demo")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        with started(directory, "--steps", str(STEPS), "--port", str(port)) as process:
            assert process.stdout is not None
            head = process.stdout.readline()
            used = re.search(r"using (\d+)", head)
            assert used, head
            url = f"http://127.0.0.1:{used[1]}/metrics"
            exposition = eventually(lambda: with_steps(fetch(url)), "steps are in /metrics while it trains", 90)
            output, _ = process.communicate(timeout=150)
    assert process.returncode is not None
    return Demo(directory, port, head + output, process.returncode, exposition)


def with_steps(exposition: str | None) -> str | None:
    """The exposition, once it shows steps of a run that is under way."""
    steps = re.search(r"^gradwatch_steps_total\{.*\} (\S+)$", exposition or "", flags=re.MULTILINE)
    return exposition if steps and 0 < float(steps[1]) < STEPS else None


def test_it_ends_well_and_says_which_port_it_took(demo: Demo) -> None:
    assert demo.exit_code == 0, demo.output
    assert demo.output.startswith(f"port {demo.taken_port} is taken; using ")
    assert f"step {STEPS}/{STEPS}" in demo.output
    assert "finished" in demo.output


def test_metrics_are_up_while_it_trains(demo: Demo) -> None:
    for name in ("grad_norm", "grad_norm_q", "clipped_steps_total", "loss", "learning_rate", "run_info"):
        assert re.search(rf"^gradwatch_{name}\{{.*model=\"churn-lstm\"", demo.exposition, flags=re.MULTILINE), name
    assert re.search(r'^gradwatch_run_state\{.*state="running".*\} 1', demo.exposition, flags=re.MULTILINE)


def test_the_journal_holds_every_step_and_the_corrupt_batches_stand_out(demo: Demo) -> None:
    rows = demo.rows
    assert rows.step.tolist() == list(range(STEPS))
    norms = rows["grad_norm"]
    planted = corrupt_steps(STEPS)
    assert sorted(np.argsort(norms)[-4:].tolist()) == planted
    assert (norms[planted] > 5 * rows["clip_threshold"][planted]).all()
    assert np.allclose(rows["clip_coefficient"][planted], 1.0 / (norms[planted] + 1e-6), rtol=1e-5)


def test_mlflow_holds_the_run(demo: Demo) -> None:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{demo.directory / 'gradwatch-demo/mlflow.db'}")
    experiment = client.get_experiment_by_name("churn-lstm")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["gradwatch.run"].startswith("demo-")
    parameters = {name: value for name, value in run.data.params.items() if name.startswith("gradwatch.")}
    assert "3e-04" in parameters.values() or "0.0003" in parameters.values()
    assert "64" in parameters.values()
    logged = [name for name in run.data.metrics if name.startswith("gradwatch/")]
    largest = max(
        point.value
        for name in logged
        if "grad_norm" in name
        for point in client.get_metric_history(run.info.run_id, name)
    )
    assert largest == pytest.approx(float(demo.rows["grad_norm"].max()), rel=1e-6)
    assert max(point.step for point in client.get_metric_history(run.info.run_id, logged[0])) == STEPS - 1


def test_the_findings_name_the_corrupt_batches(demo: Demo) -> None:
    planted = corrupt_steps(STEPS)
    assert f"planted at steps {', '.join(map(str, planted))}" in demo.output
    [place] = find_attempts(demo.directory / "gradwatch-demo/journals")
    command = [sys.executable, "-m", "gradwatch", "findings", str(place.path), "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout)
    spikes = {finding["step"] for finding in found if finding["code"] == "gradient-spike"}
    assert set(planted) <= spikes
    assert "gradient-spike" in demo.output


def test_the_commands_that_it_names_work_as_they_stand(demo: Demo) -> None:
    commands = re.findall(r"^  .*?  (gradwatch (?:runs|findings|explain) .*)$", demo.output, flags=re.MULTILINE)
    assert [command.split()[1] for command in commands] == ["runs", "findings", "explain"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    for command in commands:
        done = subprocess.run(
            command.split(), cwd=demo.directory, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout.strip()


def test_keep_serving_serves_until_it_is_interrupted(tmp_path: Path) -> None:
    port = free_port()
    with started(tmp_path, "--steps", "8", "--port", str(port), "--keep-serving") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("serving "):
                break
        exposition = fetch(f"http://127.0.0.1:{port}/metrics")
        assert exposition is not None
        assert re.search(r'^gradwatch_run_state\{.*state="finished".*\} 1', exposition, flags=re.MULTILINE)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert fetch(f"http://127.0.0.1:{port}/metrics") is None
