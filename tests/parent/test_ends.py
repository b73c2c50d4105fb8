"""Every end of a real training, told by a real agent to a real MLflow: status, state, reason, last step, last steps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from gradwatch.catalog import END_STATES
from gradwatch.collect.life import true_end
from gradwatch.collect.model import RunEnd
from gradwatch.journal.exits import Exit
from gradwatch.journal.manifest import Manifest
from gradwatch.probe.ends import UNKNOWN
from tests.agent.processes import environment
from tests.chaos.mlflow_side import client_of, last_steps
from tests.collect.test_witness import kernel_tells
from tests.services import MlflowServer, eventually, fetch, mlflow_server  # noqa: F401 (a fixture)

ROOT = Path(__file__).parents[2]
#: More than the table of the last steps holds.
STEPS = 1_100
TABLE = 1_000
#: What tells a status without a parent of ours: Linux from 6.15 on.
KERNEL = kernel_tells()


@dataclass
class Training:
    root: Path
    server: MlflowServer
    run: str

    def start(self, how: str, parent: bool) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tests.parent.trainer", how, str(STEPS)]
        if parent:
            command = [sys.executable, "-m", "gradwatch", "run", "--dir", str(self.root), "--", *command]
        where = {"GRADWATCH_RUN": self.run, "MLFLOW_TRACKING_URI": self.server.url}
        where |= {} if parent else {"HOLD_BEFORE_THE_END": "1"}
        drop = ("GRADWATCH_DIR", "GRADWATCH_PARENT", "GRADWATCH_AGENT", "MLFLOW_RUN_ID")
        kept = {key: value for key, value in environment().items() if key not in drop}
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=ROOT,
            env={**kept, **where, "XDG_STATE_HOME": str(self.root.parent), "GRADWATCH_LISTEN": "127.0.0.1:0"},
        )

    def mlflow_run(self) -> dict[str, object] | None:
        from mlflow import MlflowClient

        client = MlflowClient(self.server.url)
        ids = [experiment.experiment_id for experiment in client.search_experiments()]
        found = client.search_runs(ids, f"tags.`gradwatch.run` = '{self.run}'")
        if not found or found[0].info.status == "RUNNING":
            return None
        return {"id": found[0].info.run_id, "status": found[0].info.status, **found[0].data.tags}

    def last_steps(self, run_id: str) -> list[int]:
        return last_steps(client_of(self.server.url), run_id)

    def states(self) -> set[str]:
        """The states that the run's agent shows as true now; none while it does not answer."""
        try:
            address = json.loads((self.root / ".agent/agent.json").read_text())["address"]
        except (OSError, ValueError, KeyError):
            return set()
        lines = (fetch(f"http://{address}/metrics") or "").splitlines()
        own = [line for line in lines if line.startswith("gradwatch_run_state{") and f'run="{self.run}"' in line]
        return {line.split('state="')[1].split('"')[0] for line in own if line.endswith(" 1.0")}

    def shown_end(self) -> str:
        """The end state on ``/metrics``, which the agent shows until it has been seen once."""
        return eventually(lambda: next(iter(self.states() & set(END_STATES)), None), "the end on /metrics", 90.0)


@pytest.fixture
def training(tmp_path: Path, mlflow_server: MlflowServer) -> Iterator[Training]:  # noqa: F811
    one = Training(tmp_path / "gradwatch", mlflow_server, f"end-{os.getpid()}-{time.monotonic_ns()}")
    yield one
    try:
        agent = json.loads((one.root / ".agent/agent.json").read_text())["pid"]
        os.kill(agent, signal.SIGKILL)
    except (OSError, ValueError, KeyError):
        pass


def check(training: Training, status: str, state: str, reason: str) -> None:
    """The end in all its places: status, tags, and the last steps in MLflow."""
    found = eventually(training.mlflow_run, "the end in MLflow", seconds=60.0)
    told = {key: found.get(f"gradwatch.{key}") for key in ("state", "reason", "step")}
    assert (found["status"], told["state"], told["step"]) == (status, state, str(STEPS - 1)), told
    assert reason in str(told["reason"])
    steps = eventually(lambda: training.last_steps(str(found["id"])) or None, "the last steps in MLflow")
    assert steps == list(range(STEPS - TABLE, STEPS))


@pytest.mark.services
@pytest.mark.parametrize(
    ("how", "code", "status", "state", "reason"),
    [
        ("finish", 0, "FINISHED", "finished", ""),
        ("raise", 1, "FAILED", "failed", "RuntimeError: the data ran out"),
        ("raise-in-with", 1, "FAILED", "failed", "RuntimeError: the data ran out"),
        ("exit-3", 3, "FAILED", "failed", "exit status 3"),
        ("system-exit-3", 3, "FAILED", "failed", "exit status 3"),
        ("unfinished", 0, "FINISHED", "finished", ""),
        ("os-exit-3", 3, "FAILED", "failed", "exit status 3"),
        ("os-exit-137", 137, "KILLED", "killed", "exit status 137"),
        ("segfault", -11, "FAILED", "failed", "crashed by SIGSEGV"),
    ],
)
def test_with_a_parent_every_end_is_exact(
    training: Training, how: str, code: int, status: str, state: str, reason: str
) -> None:
    process = training.start(how, parent=True)
    assert training.shown_end() == state
    process.communicate(timeout=120)
    assert process.returncode == code
    check(training, status, state, reason)


@pytest.mark.services
@pytest.mark.parametrize(("number", "reason"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGKILL, "SIGKILL")])
def test_with_a_parent_a_kill_names_its_signal(training: Training, number: int, reason: str) -> None:
    process = training.start("wait", parent=True)
    assert process.stdout is not None
    os.kill(int(process.stdout.readline().split()[1]), number)
    assert training.shown_end() == "killed"
    process.communicate(timeout=120)
    assert process.returncode == -number
    check(training, "KILLED", "killed", reason)


@pytest.mark.services
def test_without_a_parent_sigterm_leaves_its_stack(training: Training) -> None:
    process = training.start("wait", parent=False)
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    assert training.shown_end() == "killed"
    process.communicate(timeout=60)
    check(training, "KILLED", "killed", "SIGTERM")
    found = training.mlflow_run()
    assert found is not None
    assert "trainer.py" in str(found["gradwatch.exception"])


@pytest.mark.services
@pytest.mark.parametrize(
    ("how", "status", "state", "reason"),
    [
        ("sigkill", "KILLED", "killed", "SIGKILL"),
        ("os-exit-3", "FAILED", "failed", "exit status 3"),
        ("segfault", "FAILED", "failed", "crashed by SIGSEGV"),
    ],
)
def test_without_a_parent_the_kernel_tells_and_where_it_does_not_the_end_is_abrupt(
    training: Training, how: str, status: str, state: str, reason: str
) -> None:
    process = training.start("wait" if how == "sigkill" else how, parent=False)
    assert process.stdout is not None
    process.stdout.readline()
    eventually(lambda: "running" in training.states(), "the agent follows it")
    if how == "sigkill":
        process.kill()
    process.communicate(timeout=60)
    if not KERNEL:
        status, state, reason = "FAILED", "abrupt", "left no word"
    assert training.shown_end() == state
    check(training, status, state, reason)


@pytest.mark.services
@pytest.mark.parametrize(("how", "code"), [("unfinished", 0), ("system-exit-3", 3)])
def test_without_a_parent_a_status_that_nobody_tells_is_not_claimed(training: Training, how: str, code: int) -> None:
    process = training.start(how, parent=False)
    eventually(lambda: "running" in training.states(), "the agent follows it")
    process.communicate(timeout=60)
    assert process.returncode == code
    if not KERNEL:
        check(training, "FINISHED", "finished", "exit status unknown")
    elif code:
        check(training, "FAILED", "failed", "exit status 3")
    else:
        check(training, "FINISHED", "finished", "")
        found = training.mlflow_run()
        assert found is not None
        assert found["gradwatch.exit_code"] == "0"


MANIFEST = Manifest(run="r", model="m", pid=7)
UNTOLD = RunEnd("abrupt", "no word", 1.0, 9)
FROM_ATEXIT = RunEnd("finished", UNKNOWN.reason, 1.0, 9)


def test_out_of_memory_is_named_where_the_cgroup_counted_it() -> None:
    for word in (Exit(7, 2.0, signal=9, oom_kills=1), Exit(7, 2.0, exit_code=137, oom_kills=1)):
        end = true_end(None, word, "", MANIFEST, UNTOLD)
        assert (end.state, end.last_step) == ("killed", 9)
        assert end.reason.startswith("out of memory")
    assert "out of memory" not in true_end(None, Exit(7, 2.0, signal=9, oom_kills=0), "", MANIFEST, UNTOLD).reason


def test_a_launcher_between_is_no_witness_of_the_trainers_own_end() -> None:
    end = true_end(None, Exit(8, 2.0, exit_code=1), "", MANIFEST, UNTOLD)
    assert (end.state, end.exit_code) == ("abrupt", None)
    assert "its launcher ended with exit status 1" in end.reason


def test_what_the_trainer_knew_stands_and_what_it_did_not_know_is_filled_in() -> None:
    failed = RunEnd("failed", "RuntimeError: x", 1.0, 9, exit_code=1)
    assert true_end(failed, Exit(7, 2.0, signal=11), "", MANIFEST, UNTOLD) == failed
    finished = RunEnd("finished", "", 1.0, 9, exit_code=0)
    assert true_end(finished, Exit(7, 2.0, exit_code=3), "", MANIFEST, UNTOLD) == finished
    assert true_end(FROM_ATEXIT, Exit(7, 2.0, exit_code=3), "", MANIFEST, UNTOLD).state == "failed"
    well = true_end(FROM_ATEXIT, Exit(7, 2.0, exit_code=0), "", MANIFEST, UNTOLD)
    assert (well.state, well.reason, well.exit_code) == ("finished", "", 0)
    assert true_end(FROM_ATEXIT, Exit(8, 2.0, exit_code=3), "", MANIFEST, UNTOLD) == FROM_ATEXIT
