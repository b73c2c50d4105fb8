"""From a fault in a training to a notification: real training, agent, Prometheus, Alertmanager and webhook receiver.

The rules are generated with ``--for-factor``, which multiplies every ``for`` and changes nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from gradwatch.catalog import METRICS
from tests import services
from tests.ops.alert_support.expressions import metric_of, rules
from tests.ops.alert_support.receiver import receiver
from tests.ops.dashboard_support import promql
from tests.ops.test_alerts_routes import local

pytestmark = pytest.mark.services

ROOT = Path(__file__).parents[2]
#: Five minutes become three seconds.
FOR_FACTOR = 0.01
#: A loop that clips by ``threshold`` and runs until its standard input ends.
TRAINER = """
import sys, threading, time
import torch
from torch import nn
import gradwatch

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
optimizer = torch.optim.AdamW([
    {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 1e-2},
    {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
], lr=1e-3)
threshold = float(sys.argv[1])
run = gradwatch.watch(
    model, optimizer, model_name=sys.argv[2], run_name=sys.argv[2] + "-run", max_norm=threshold, tier="production",
    config={"batch_size": 16},
)
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
step = 0
while not ended.is_set():
    x = torch.randn(16, 6)
    y = x.sum(1, keepdim=True) + 3 * torch.randn(16, 1)  # noise in the labels keeps the norms at 5 to 15
    loss = nn.functional.mse_loss(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), threshold)
    optimizer.step()
    run.log_train(loss=loss, samples=16)
    step += 1
    if step % 100 == 0:
        run.log_validation(loss=loss.item() * 1.01)
    time.sleep(0.004)
run.finish()
assert run.last_failure == "", run.last_failure
"""


def start(directory: Path, root: Path, threshold: float, model: str) -> subprocess.Popen[bytes]:
    script = directory / "train.py"
    script.write_text(TRAINER)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GRADWATCH_DIR": str(root), "GRADWATCH_AGENT": "0"}
    return subprocess.Popen(
        [sys.executable, str(script), str(threshold), model], env=environment, stdin=subprocess.PIPE
    )


def generated(directory: Path) -> list[Path]:
    command = [sys.executable, str(ROOT / "alerts" / "generate.py"), "--for-factor", str(FOR_FACTOR)]
    subprocess.run([*command, "--out", str(directory)], check=True, timeout=60, capture_output=True)
    return sorted(directory.glob("*.yaml"))


def test_a_planted_fault_arrives_and_a_healthy_training_is_silent(tmp_path: Path) -> None:
    root = tmp_path / "journals"
    root.mkdir()
    log = (tmp_path / "agent.log").open("wb")
    agent = subprocess.Popen(
        [sys.executable, "-m", "gradwatch", "agent", "--dir", str(root), "--listen", "127.0.0.1:0"],
        stdout=log,
        stderr=log,
    )
    trainings: list[subprocess.Popen[bytes]] = []
    try:
        told = root / ".agent" / "agent.json"
        address = services.eventually(
            lambda: json.loads(told.read_text())["address"] if told.exists() else None, "the agent to listen", 60
        )
        with (
            receiver() as hook,
            services.Alertmanager(tmp_path / "alertmanager", local(hook)) as alertmanager,
            services.Prometheus(
                tmp_path / "prometheus", [address], rules=generated(tmp_path / "rules"), alertmanager=alertmanager.url
            ) as prometheus,
        ):
            # A threshold of 1e-3 clips every step; 30 is out of the norms' reach, and near enough to guard.
            trainings.append(start(tmp_path, root, 1e-3, "faulty"))
            trainings.append(start(tmp_path, root, 30, "healthy"))

            def paged() -> list[dict[str, str]]:
                return [alert for alert in hook.alerts("/pager") if alert["model"] == "faulty"]

            first = services.eventually(paged, "the page of the faulty training", 60)[0]
            assert first["alertname"] == "GradwatchClippingDominates"
            services.eventually(
                lambda: "GradwatchClipRateHigh" in {alert["alertname"] for alert in hook.alerts("/tickets")},
                "the ticket about the clip rate",
            )
            services.eventually(lambda: hook.alerts("/watchdog"), "the watchdog")

            # The healthy training was judged by the same rules: no alert about it fires, or waits for its `for`.
            def judged() -> bool:
                steps = prometheus.query('max(gradwatch_recent_steps{model="healthy"})')
                return bool(steps) and steps[0][1] >= 400

            services.eventually(judged, "400 steps of the healthy training", 60)
            serious = [alert for path in ("/pager", "/tickets", "/bridge") for alert in hook.alerts(path)]
            assert [alert for alert in serious if alert.get("model") == "healthy"] == []
            assert [alert for alert in prometheus.alerts() if alert["labels"].get("model") == "healthy"] == []

            post = next(post for post in hook.at("/pager") if post["groupLabels"]["alertname"] == first["alertname"])
            annotations = post["alerts"][0]["annotations"]
            assert "faulty, run faulty-run" in annotations["summary"]
            assert "100% of the recent steps" in annotations["description"]
            assert "the budget is 10%" in annotations["description"]
            link = parse_qs(urlsplit(annotations["dashboard_url"]).query)
            assert link["var-run"] == [first["run"]]
            assert int(link["to"][0]) - int(link["from"][0]) == 6 * 3600 * 1000

            check_that_what_rules_use_is_exported(address)
    finally:
        for training in trainings:
            assert training.stdin is not None
            training.stdin.close()
        codes = [training.wait(60) for training in trainings]
        agent.terminate()
        agent.wait(60)
        log.close()
    assert codes == [0, 0]


def check_that_what_rules_use_is_exported(address: str) -> None:
    """Every metric of a rule stands in the exposition of a real training, but those of the bridge, of service levels
    that this training does not log, and of sinks that it does not have."""
    exposition = services.fetch(f"http://{address}/metrics")
    assert exposition is not None
    names = {selector.metric for rule in rules() for selector in promql.selectors(rule["expr"])}
    scraped = {name for name in names if name.startswith("gradwatch_")}
    absent = {"gradwatch_slo_events_total", *(m.exposed for m in METRICS if m.name.startswith("sink_"))}
    wanted = {name for name in scraped if metric_of(name).scope != "bridge"} - absent
    assert len(wanted) > 10
    missing = {name for name in wanted if f"\n{name}{{" not in exposition}
    assert missing == set()
