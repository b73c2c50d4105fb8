"""Secrets planted wherever a training has them are in none of the places that gradwatch writes or serves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.agent.processes import agent, environment
from tests.services import MlflowServer, fetch

ROOT = Path(__file__).parents[2]
PLANTED = ("s3cr3t-config-4711", "s3cr3t-env-4712", "s3cr3t-raised-4713", "s3cr3t-uri-4714")
TRAINER = """
import torch, gradwatch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
gradwatch.watch(model, optimizer, model_name="tiny", config={"api_key": "s3cr3t-config-4711", "witness": "seen-4715"})
for _ in range(5):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
raise RuntimeError("cannot reach postgresql://me:s3cr3t-raised-4713@db/x, witness seen-4716")
"""


def everything_below(*directories: Path) -> bytes:
    files = [file for directory in directories for file in directory.rglob("*") if file.is_file()]
    return b"\n".join(file.read_bytes() for file in files)


@pytest.mark.services
def test_no_secret_is_in_journals_logs_metrics_page_or_mlflow(tmp_path: Path) -> None:
    root = tmp_path / "journals"
    (tmp_path / "mlflow").mkdir()
    with MlflowServer(tmp_path / "mlflow") as server:
        drop = ("GRADWATCH_DIR", "GRADWATCH_PARENT", "GRADWATCH_AGENT", "GRADWATCH_RUN")
        env = {key: value for key, value in environment().items() if key not in drop}
        env["SERVICE_PASSWORD"] = PLANTED[1]
        env["MLFLOW_TRACKING_URI"] = server.url.replace("http://", f"http://me:{PLANTED[3]}@")
        env["GRADWATCH_LISTEN"] = "127.0.0.1:0"
        command = [sys.executable, "-m", "gradwatch", "run", "--dir", str(root), "--drain", "30", "--"]
        done = subprocess.run(
            [*command, sys.executable, "-c", TRAINER], env=env, cwd=ROOT, capture_output=True, timeout=120
        )
        assert done.returncode == 1
        os.environ.pop("MLFLOW_TRACKING_URI", None)
        with agent(root, state=tmp_path / "state") as process:
            served = "".join(fetch(process.url + path) or "" for path in ("/metrics", "/"))
        written = everything_below(root, tmp_path / "state", tmp_path / "mlflow") + process.log.read_bytes()
    # What may be seen is there: the search looks in the right places.
    assert b"seen-4715" in written
    assert b"seen-4716" in written
    assert "tiny" in served
    for secret in PLANTED:
        assert secret.encode() not in written
        assert secret not in served
