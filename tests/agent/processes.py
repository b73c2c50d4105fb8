"""The agent and its writers as the processes that they are, each stopped by its own handle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from tests.services import eventually, fetch

ROOT = Path(__file__).parents[2]


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "agent")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class AgentProcess:
    """``gradwatch agent`` on a free port; ``metrics`` reads what it serves."""

    def __init__(self, directory: Path, *options: str, state: Path | None = None, log: Path | None = None) -> None:
        self.state = state or directory / ".agent"
        self.log = log or directory.parent / f"{directory.name}-agent.log"
        command = [sys.executable, "-m", "gradwatch", "agent", "--dir", str(directory), "--listen", "127.0.0.1:0"]
        command += ["--state", str(state)] if state is not None else []
        with self.log.open("ab") as output:
            self.handle = subprocess.Popen([*command, *options], stdout=output, stderr=output, env=environment())
        self.url = f"http://{eventually(self._address, 'the agent says where it listens')}"
        eventually(lambda: fetch(f"{self.url}/healthz"), "the agent answers")

    def _address(self) -> str | None:
        assert self.handle.poll() is None, self.log.read_text()
        try:
            document = json.loads((self.state / "agent.json").read_text())
        except (OSError, ValueError):
            return None
        return str(document["address"]) if document["pid"] == self.handle.pid and document["address"] else None

    def metrics(self) -> dict[tuple[str, str], float]:
        """(metric, run) -> value, of series without further labels than ``optimizer`` or ``state``."""
        body = fetch(f"{self.url}/metrics") or ""
        values: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(body):
            for sample in family.samples:
                run = sample.labels.get("run", "")
                if sample.name == "gradwatch_run_state":
                    if sample.value:
                        values[f"state:{sample.labels['state']}", run] = 1.0
                elif set(sample.labels) <= {"model", "run", "optimizer"}:
                    values[sample.name.removeprefix("gradwatch_"), run] = sample.value
        return values

    def kill(self) -> None:
        self.handle.send_signal(signal.SIGKILL)
        self.handle.wait(10)

    def stop(self) -> int:
        if self.handle.poll() is None:
            self.handle.terminate()
        return self.handle.wait(30)


@contextmanager
def agent(directory: Path, *options: str, **where: Any) -> Iterator[AgentProcess]:
    process = AgentProcess(directory, *options, **where)
    try:
        yield process
    finally:
        if process.handle.poll() is None:
            process.kill()


def writer(root: Path, run: str, steps: int, rate: float, end: str, *more: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.agent.writer", str(root), run, str(steps), str(rate), end, *map(str, more)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )


def written(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a writer says when it has written all."""
    assert process.stdout is not None
    return dict(json.loads(process.stdout.readline()))
