"""Every metric of the catalogue that an agent exports is exported by one short, real training."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.agent.service import Agent, Settings
from gradwatch.agent.store import Store
from gradwatch.catalog import METRICS
from tests.services import eventually

#: Exported only where an MLflow sink is configured.
_OF_SINKS = {"sink_errors", "sink_backlog", "sink_dropped"}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the series that an agent shows of a training with everything: scaler, clip, validation, levels."""
    root: Path = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, weight_decay=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("GRADWATCH_AGENT", "0")
        run = gradwatch.watch(model, optimizer, model_name="all", max_norm=0.5, config={"batch_size": 8}, root=root)
        for step in range(40):
            x = torch.randn(8, 6)
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)) * (math.inf if step == 20 else 1.0)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
            if step != 20:
                run.log_train(loss=loss, samples=8, accuracy=0.5)
            if step % 10 == 9:
                run.log_validation(loss=0.5, accuracy=0.4)
                run.log_validation(loss=0.6, slice="tenant-7")
                run.log_slo("freshness", good=9, bad=1)
        run.finish()
        assert run.last_failure == ""
    agent = Agent(Settings(root), Store(root / ".agent"))
    eventually(lambda: not agent.tick() and agent.runs and all(r.over for r in agent.runs.values()), "the end")
    text = agent.exposition.render()[0].decode()
    return {line.partition("{")[0].partition(" ")[0] for line in text.splitlines() if not line.startswith("#")}


@pytest.mark.parametrize(
    "name", [m.exposed for m in METRICS if m.scope in ("run", "rank", "agent") and m.name not in _OF_SINKS]
)
def test_a_real_training_exports(families: set[str], name: str) -> None:
    histogram = f"{name}_bucket"
    assert name in families or histogram in families
