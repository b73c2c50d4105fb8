"""Real trainings for the gates, uploaded by a real agent to a real MLflow server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gradwatch.cli import main

#: A regression with two parameter groups, validated on all data and on a cohort. Arguments: JSON of changes by run.
TRAINING = """
import json, os, sys, torch, gradwatch
for name, changes in json.loads(sys.argv[1]).items():
    asked = {"decay": 0.01, "lr": 0.05, "max_norm": 100.0, "config": {}, "partial": False,
             "nan": False, "scale": 1.0, "accuracy": 0.9, "cohort": 0.8, "costs": {}, "ece": 0.02, "train_loss": None}
    asked |= changes
    os.environ["GRADWATCH_RUN"] = name
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= asked["scale"]
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": weights, "weight_decay": asked["decay"]}, {"params": biases, "weight_decay": 0.0}], lr=asked["lr"]
    )
    config = {"schedule": "constant", "batch_size": 16, "accumulation_steps": 1, "data_fingerprint": "sha256:abc"}
    config |= asked["config"]
    config = {k: v for k, v in config.items() if v is not None}
    run = gradwatch.watch(model, optimizer, model_name="gated", max_norm=asked["max_norm"], config=config)
    x = torch.randn(16, 4); y = x.sum(1, keepdim=True)
    for step in range(40):
        loss = torch.nn.functional.mse_loss(model(x), y)
        if asked["nan"] and step == 39:
            loss = loss * float("nan")
        loss.backward()
        clipped = list(model.parameters())
        torch.nn.utils.clip_grad_norm_(clipped[:2] if asked["partial"] else clipped, asked["max_norm"])
        optimizer.step(); optimizer.zero_grad()
        run.log_train(loss=loss.detach() if asked["train_loss"] is None else asked["train_loss"])
    run.log_validation(loss=1.0 if asked["train_loss"] else float(loss.detach().nan_to_num()),
                       accuracy=asked["accuracy"], ece=asked["ece"], **asked["costs"])
    if asked["cohort"] is not None:
        run.log_validation(slice="tenant-7", accuracy=asked["cohort"])
    run.finish()
"""


@dataclass(frozen=True)
class Gated:
    """A directory of journals and the address of an MLflow server that an agent has filled from it."""

    journals: Path
    mlflow: str

    def train(self, runs: Mapping[str, Mapping[str, Any]]) -> None:
        """Train each in turn, in one process; the values are what it does otherwise."""
        environment = {**os.environ, "GRADWATCH_DIR": str(self.journals)}
        done = subprocess.run(
            [sys.executable, "-c", TRAINING, json.dumps(runs)], env=environment, capture_output=True, timeout=120
        )
        assert done.returncode == 0, done.stderr.decode()

    def upload(self) -> None:
        state = self.journals.parent / "state"
        command = [sys.executable, "-m", "gradwatch", "agent", "--dir", str(self.journals), "--until-done"]
        command += ["--mlflow", self.mlflow, "--listen", "127.0.0.1:0", "--state", str(state), "--linger", "0"]
        done = subprocess.run(command, capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr.decode()

    def run_id(self, run: str) -> str:
        """The id in MLflow of an uploaded run."""
        from mlflow import MlflowClient

        client = MlflowClient(self.mlflow, registry_uri=self.mlflow)
        experiments = [e.experiment_id for e in client.search_experiments()]
        found = client.search_runs(experiments, f"tags.`gradwatch.run` = '{run}'")
        assert len(found) == 1
        return str(found[0].info.run_id)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """A command in this process: exit code, output, errors."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def verdicts(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, str], dict[str, Any]]:
    """Exit code, result by check, and the whole entry of the one target."""
    code, out, err = call(capsys, *arguments, "--json")
    assert out, err
    (entry,) = json.loads(out)
    return code, {check["name"]: check["result"] for check in entry["checks"]}, entry


def failed(results: dict[str, str]) -> Sequence[str]:
    return [name for name, result in results.items() if result == "failed"]
