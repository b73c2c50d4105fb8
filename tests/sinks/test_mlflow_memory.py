"""The agent's memory with an MLflow server: bounded, and flat over what it sends. In a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.services import MlflowServer

_CODE = """
import sys, time
from pathlib import Path
from gradwatch.collect.model import RunFacts, Window
from gradwatch.journal.manifest import Manifest
from gradwatch.sinks.mlflow import MlflowSink

def resident():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("VmRSS:")[2].split()[0]) / 1024

manifest = Manifest(run="memory", model="model-memory", hyperparameters={"lr": 0.001})
facts = RunFacts("memory", 0, manifest, manifest.hyperparameters, 1.7e9)
sink = MlflowSink(sys.argv[1], state_dir=Path(sys.argv[2]))
for block in range(4):
    for number in range(block * 500, block * 500 + 500):
        values = {f"value_{index}": (number + 1) / (index + 3) for index in range(25)}
        sink.window(facts, Window("default", 0, number, number, 1.7e9, 1.7e9, 1, 0, 0, 0, 0, values))
    deadline = time.monotonic() + 120
    while sink.pending() and time.monotonic() < deadline:
        time.sleep(0.02)
    print(resident(), sink.pending())
sink.close(time.monotonic() + 10)
"""


def test_memory_is_bounded_and_flat(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    command = [sys.executable, "-c", _CODE, mlflow_server.url, str(tmp_path)]
    done = subprocess.run(command, timeout=160, check=True, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    resident = [float(line[0]) for line in lines]
    assert [line[1] for line in lines] == ["0"] * 4
    assert max(resident) <= 220
    assert resident[-1] - resident[0] <= 8
