"""Real process groups for tests: a script under torchrun, its ranks' journals, and the agent that comes behind it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from gradwatch.agent.service import Agent, Settings
from gradwatch.agent.store import Store
from gradwatch.journal import Events, JournalReader, find_attempts
from gradwatch.journal.manifest import Manifest
from tests.services import eventually

#: Beyond any wait of a rank that is alive, far below the patience of whoever waits for the suite.
SECONDS = 150.0


@dataclass(frozen=True)
class Job:
    """What a job left: its exit status, what it said, and each rank's journal."""

    status: int
    output: str
    journals: dict[int, tuple[Manifest, Events]]


def run(root: Path, script: Path, world: int, *arguments: str, run: str | None = "job") -> Job:
    """Run ``script`` with ``world`` ranks on loopback to its end, however it ends, and read every rank's journal."""
    environment = {
        **os.environ,
        "GRADWATCH_DIR": str(root),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join(["agent", "."]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    environment.pop("GRADWATCH_RUN", None)
    if run is not None:
        environment["GRADWATCH_RUN"] = run
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", str(world), str(script), *arguments]
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    return Job(done.returncode, done.stdout + done.stderr, read(root))


def read(root: Path) -> dict[int, tuple[Manifest, Events]]:
    """Manifest and rows of every rank below a root."""
    journals = {}
    for place in find_attempts(root):
        reader = JournalReader(place.path)
        journals[place.rank] = (reader.manifest, reader.poll())
        reader.close()
    return journals


def serve(root: Path) -> dict[str, float]:
    """What an agent that comes behind the job shows of it: series (name and labels) and values."""
    agent = Agent(Settings(root), Store(root / ".agent"))
    eventually(lambda: not agent.tick() and agent.runs and all(r.over for r in agent.runs.values()), "the end")
    text = agent.exposition.render()[0].decode()
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in lines}
