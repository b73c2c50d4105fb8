"""Every query of every dashboard on what real processes export: two trainings, their agents, the bridge and MLflow.

One training has ended and its agent has left; the other was killed once, went
on as its next attempt, and still runs. Each must fill the panels that speak of
it. What a query means is tried on history in ``test_dashboard_queries.py``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests import services
from tests.bridge.conftest import BridgeProcess
from tests.ops.dashboard_support.panels import Target, request, targets
from tests.ops.test_alerts_end_to_end import generated
from tests.ops.test_dashboard_queries import OF_LIVE_ONLY

pytestmark = [pytest.mark.services, pytest.mark.xdist_group("live"), pytest.mark.timeout(400)]

MODEL, FINISHED, LIVE = "churn", "finished-1", "live-1"
#: A dashboard's range, in which most panels have a point each quarter of a minute.
RANGE, POINT = 3 * 3600.0, 15.0
#: With a GradScaler, a clip that fires now and then, one step that is not finite, two slices and a service level.
TRAINER = """
import math, sys, threading, time
import torch
from torch import nn
import gradwatch

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, weight_decay=float(sys.argv[2]))
scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
run = gradwatch.watch(
    model, optimizer, model_name=sys.argv[1], max_norm=5.0, tier="production",
    config={"batch_size": 16, "model_size_bytes": 1234}, generalization_gap_budget=0.1,
)
steps = int(sys.argv[3])  # 0: until its standard input ends
ended = threading.Event()
if not steps:
    threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
step = 0
while not ended.is_set() and (not steps or step < steps):
    x = torch.randn(16, 6)
    loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)) * (math.inf if step == 30 else 1.0)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    scaler.step(optimizer)
    scaler.update()
    if step != 30:
        run.log_train(loss=loss, samples=16, accuracy=0.9)
    if step % 20 == 19:
        run.log_validation(loss=loss.item() * 1.5, accuracy=0.8, latency_p95_seconds=0.1, cost_per_inference=0.01)
        run.log_validation(loss=loss.item() * 1.2, slice="tenant-7")
        run.log_slo("freshness", good=9, bad=1)
    step += 1
    time.sleep(0.01)
run.finish()
assert run.last_failure == "", run.last_failure
"""


def agent(stack: ExitStack, root: Path, *more: str) -> tuple[subprocess.Popen[bytes], str]:
    """An agent of ``root`` until the stack is left, and its address."""
    root.mkdir()
    command = [sys.executable, "-m", "gradwatch", "agent", "--dir", str(root), "--listen", "127.0.0.1:0", *more]
    log = stack.enter_context((root.parent / f"{root.name}.log").open("wb"))
    process = subprocess.Popen(command, stdout=log, stderr=log)
    stack.callback(stop, process)
    told = root / ".agent" / "agent.json"
    return process, services.eventually(
        lambda: json.loads(told.read_text())["address"] if told.exists() else None, "the agent to listen", 60
    )


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process by its handle, however it stands."""
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(60)
    finally:
        process.kill()


def training(stack: ExitStack, root: Path, run: str, decay: float, steps: int) -> subprocess.Popen[bytes]:
    script = root.parent / "train.py"
    script.write_text(TRAINER)
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "GRADWATCH_DIR": str(root), "GRADWATCH_AGENT": "0", "GRADWATCH_RUN": run,
    }  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, str(script), MODEL, str(decay), str(steps)], env=environment, stdin=subprocess.PIPE
    )
    stack.callback(stop, process)
    return process


@dataclass(frozen=True)
class Ground:
    """A Prometheus that has seen it all; when the finished training stood well, when the live one was killed, now."""

    prometheus: services.Prometheus
    former: float
    killed: float
    now: float

    def ask(self, target: Target, end: float, **chosen: str) -> list[Any]:
        # The range is a whole number of the panel's steps: its last point is its end.
        path, parameters = request(target, end - max(RANGE, target.interval), end, 0.5, **chosen)
        told = self.prometheus.get_json(path, **parameters)
        assert told is not None, f"Prometheus refused {parameters['query']}"
        return list(told["data"]["result"])


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    place: Path = tmp_path_factory.mktemp("live")
    with ExitStack() as stack:
        mlflow = stack.enter_context(services.MlflowServer(place / "mlflow"))
        bridge = stack.enter_context(BridgeProcess(place / "bridge", mlflow.url))
        former, former_address = agent(stack, place / "former", "--mlflow", mlflow.url, "--until-done")
        _, address = agent(stack, place / "present", "--mlflow", mlflow.url)
        prometheus = stack.enter_context(
            services.Prometheus(
                place / "prometheus",
                [former_address, address, bridge.url.removeprefix("http://")],
                rules=generated(place / "rules"),
                interval="500ms",
            )
        )
        former_training = training(stack, place / "former", FINISHED, 1e-2, 700)
        until(prometheus, f'gradwatch_step{{run="{FINISHED}"}} >= 400')
        seen = time.time()
        assert former_training.wait(120) == 0
        assert former.wait(90) == 0, "the agent leaves once its run's end was scraped"
        register(mlflow.url)

        first = training(stack, place / "present", LIVE, 1e-1, 0)
        until(prometheus, f'gradwatch_validations_total{{run="{LIVE}"}} >= 4')
        began = time.time()
        first.send_signal(signal.SIGKILL)
        first.wait(30)
        training(stack, place / "present", LIVE, 1e-1, 0)
        for state in (
            f'gradwatch_run_attempt{{run="{LIVE}"}} == 1',
            # The second attempt has trained the first one's steps again, and gone on.
            f'gradwatch_step{{run="{LIVE}"}} >= 400',
            'ALERTS{alertname="GradwatchWatchdog"}',
            f'ALERTS{{alertstate="firing",run="{LIVE}",severity="ticket"}}',
            f'gradwatch_model_version_info{{model="{MODEL}",alias="previous"}}',
            f'gradwatch_hyperparameter_drift{{model="{MODEL}",name="weight_decay"}} > 0',
            f'gradwatch_retrains{{model="{MODEL}",outcome="finished"}} > 0',
            f'gradwatch_run_heartbeat_timestamp_seconds{{run="{LIVE}"}}',
        ):
            until(prometheus, state)
        yield Ground(prometheus, seen, began, time.time())


def until(prometheus: services.Prometheus, expression: str) -> None:
    services.eventually(lambda: prometheus.query(expression), expression, 90, pause=0.25)


def register(url: str) -> None:
    """The run that ended becomes the current version of its model, as one that replaced another."""
    client = MlflowClient(url, registry_uri=url)
    [run] = client.search_runs(
        [each.experiment_id for each in client.search_experiments()], f"tags.`gradwatch.run` = '{FINISHED}'"
    )
    client.create_registered_model(MODEL, tags={"gradwatch.score_drop_budget": "0.02"})
    source = f"{run.info.artifact_uri}/model"
    for _ in range(2):
        client.create_model_version(MODEL, source, run_id=run.info.run_id)
    client.set_registered_model_alias(MODEL, "champion", "2")


def numbers(series: Mapping[str, Any]) -> list[float]:
    return [float(value) for _, value in (series.get("values") or [series["value"]])]


@pytest.mark.parametrize("target", targets(), ids=lambda target: target.id)
def test_the_live_training_fills(ground: Ground, target: Target) -> None:
    # The mark of a restart asks what was a minute before. That minute need not be waited out: until then the
    # newest samples are Prometheus's answer.
    end = max(ground.now, ground.killed + 62) if target.kind == "annotation" else ground.now
    series = ground.ask(target, end, model=MODEL, run=LIVE)
    assert series
    assert any(value == value for each in series for value in numbers(each)), "nothing but NaN"


def _of_runs(target: Target) -> bool:
    """Graphs and range-wide tables of the chosen run: what an ended run must still fill."""
    return 'run=~"$run"' in target.expression and not (target.kind == "annotation" or target.id in OF_LIVE_ONLY)


@pytest.mark.parametrize("target", [each for each in targets() if _of_runs(each)], ids=lambda target: target.id)
def test_the_finished_training_fills(ground: Ground, target: Target) -> None:
    """Its agent has left: graphs over the range, and tables that reach back into it."""
    now_only = target.instant and "[$__r" not in target.expression
    # One of the points falls on the moment at which it stood well.
    end = ground.former + POINT * ((ground.now - ground.former) // POINT)
    assert bool(ground.ask(target, end, model=MODEL, run=FINISHED)) is not now_only
