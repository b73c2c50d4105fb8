"""The main path on real parts: a PyTorch training, its agent, a real Prometheus and MLflow's sqlite.

What the loop itself counted and computed is the truth that both must show.
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import services

STEPS = 200
TRAINER = """
import json, math, os, sys, time
import torch
from torch import nn
import gradwatch

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
run = gradwatch.watch(model, optimizer, model_name="main-path", max_norm=20.0, config={"batch_size": 16})
truth = []
pace = float(sys.argv[2])
for step in range(int(sys.argv[1])):
    x = torch.randn(16, 6) * (1.0 if step % 3 else 5.0)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
    optimizer.zero_grad()
    loss.backward()
    norm = float(torch.cat([p.grad.double().flatten() for p in model.parameters()]).norm())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 20.0)
    optimizer.step()
    run.log_train(loss=loss, samples=16)
    truth.append({"loss": loss.item(), "norm": norm, "clipped": norm > 20.0})
    if step % 50 == 49:
        run.log_validation(loss=loss.item() * 1.5)
    time.sleep(pace)
run.finish()
assert run.last_failure == "", run.last_failure
json.dump({"run": run.id, "truth": truth}, open(sys.argv[3], "w"))
"""


def trainer(tmp_path: Path, root: Path, pace: float) -> subprocess.Popen[bytes]:
    script = tmp_path / "train.py"
    script.write_text(TRAINER)
    command = [sys.executable, str(script), str(STEPS), str(pace), str(tmp_path / "truth.json")]
    return subprocess.Popen(command, env={**_environment(), "GRADWATCH_DIR": str(root)})


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": "1"}


def agent(tmp_path: Path, root: Path, *more: str) -> tuple[subprocess.Popen[bytes], str]:
    """An agent on a free port, and its address."""
    command = [sys.executable, "-m", "gradwatch", "agent", "--dir", str(root), "--listen", "127.0.0.1:0", *more]
    with (tmp_path / "agent.log").open("wb") as log:
        process = subprocess.Popen(command, env=_environment(), stdout=log, stderr=log)

    def address() -> str | None:
        path = root / ".agent" / "agent.json"
        return json.loads(path.read_text())["address"] if path.exists() else None

    return process, services.eventually(address, "the agent to listen", 60)


def read_truth(tmp_path: Path) -> tuple[str, list[dict[str, Any]]]:
    document = json.loads((tmp_path / "truth.json").read_text())
    return document["run"], document["truth"]


@pytest.mark.services
def test_prometheus_sees_the_clip_rate_that_the_loop_counted(tmp_path: Path) -> None:
    root = tmp_path / "journals"
    root.mkdir()
    process, address = agent(tmp_path, root)
    try:
        with services.Prometheus(tmp_path / "prometheus", [address]) as prometheus:
            training = trainer(tmp_path, root, 0.02)
            assert training.wait(150) == 0
            run, truth = read_truth(tmp_path)
            selector = f'{{run="{run}"}}'

            def finished() -> bool:
                # The end is told behind the last step: a scrape that holds it holds every count, too.
                seen = prometheus.query(f'gradwatch_run_state{{run="{run}",state="finished"}}')
                return bool(seen) and seen[0][1] == 1

            services.eventually(finished, "Prometheus to see the end of the run", 30)
            ((_, steps),) = prometheus.query(f"gradwatch_steps_total{selector}")
            assert steps == STEPS
            clipped = sum(step["clipped"] for step in truth)
            assert 0 < clipped < STEPS
            ((_, counted),) = prometheus.query(f"gradwatch_clipped_steps_total{selector}")
            assert counted == clipped
            ((_, rate),) = prometheus.query(
                f"rate(gradwatch_clipped_steps_total{selector}[1m]) / rate(gradwatch_steps_total{selector}[1m])"
            )
            # Prometheus extrapolates from the scrapes that it has: the first came some steps into the run.
            assert rate == pytest.approx(clipped / STEPS, abs=0.1)
            ((_, norm),) = prometheus.query(f"gradwatch_grad_norm{selector}")
            assert norm == pytest.approx(truth[-1]["norm"], rel=1e-5)
            rates = prometheus.query(f"gradwatch_learning_rate{selector}")
            assert [value for _, value in rates] == [1e-3]
            exposition = services.fetch(f"http://{address}/metrics")
            assert exposition is not None
            check = subprocess.run(
                [services.program("promtool"), "check", "metrics"],
                input=exposition,
                text=True,
                capture_output=True,
                timeout=30,
                check=False,
            )
            assert (check.returncode, check.stdout, check.stderr) == (0, "", "")
    finally:
        process.terminate()
        process.wait(60)


def test_mlflow_holds_exactly_the_folds_of_what_the_loop_recorded(tmp_path: Path) -> None:
    root = tmp_path / "journals"
    root.mkdir()
    database = tmp_path / "mlflow.db"
    process, _ = agent(tmp_path, root, "--until-done", "--mlflow", f"sqlite:///{database}")
    try:
        assert trainer(tmp_path, root, 0.01).wait(150) == 0
        assert process.wait(120) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    run, truth = read_truth(tmp_path)
    with sqlite3.connect(database) as store:
        ((uuid, status),) = store.execute(
            "select r.run_uuid, r.status from runs r join tags t on t.run_uuid = r.run_uuid"
            " where t.key = 'gradwatch.run' and t.value = ?",
            (run,),
        ).fetchall()
        assert status == "FINISHED"
        parameters = dict(store.execute("select key, value from params where run_uuid = ?", (uuid,)).fetchall())
        rows = store.execute("select key, step, value from metrics where run_uuid = ?", (uuid,)).fetchall()
    assert parameters["gradwatch.config.batch_size"] == "16"
    assert parameters["gradwatch.optimizer.default.class"] == "AdamW"
    series: dict[str, dict[int, float]] = {}
    for key, step, value in rows:
        assert step not in series.setdefault(key, {}), f"{key} holds step {step} twice"
        series[key][step] = value
    edges = sorted(series["gradwatch/loss_mean"])
    assert edges[-1] == STEPS - 1, "the last step is missing"
    first = 0
    for last in edges:
        window = truth[first : last + 1]
        losses, norms = [s["loss"] for s in window], [s["norm"] for s in window]
        assert series["gradwatch/loss_mean"][last] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
        assert series["gradwatch/loss_last"][last] == pytest.approx(losses[-1], rel=1e-6)
        assert series["gradwatch/grad_norm_mean"][last] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
        assert series["gradwatch/grad_norm_max"][last] == pytest.approx(max(norms), rel=1e-5)
        assert series["gradwatch/grad_norm_last"][last] == pytest.approx(norms[-1], rel=1e-5)
        rate = sum(s["clipped"] for s in window) / len(window)
        assert series["gradwatch/clip_rate"][last] == pytest.approx(rate, abs=1e-9)
        first = last + 1
    assert sorted(series["gradwatch/validation/loss"]) == [49, 99, 149, 199]
