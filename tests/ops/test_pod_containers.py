"""A pod's life in namespaces: PID 1 in each container, the journal read-only for the agent, signals as the kubelet's.

What is asked each time: the status that MLflow has, the state and the steps that the last scrape shows.
"""

from __future__ import annotations

import signal
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from mlflow.entities import Run

from gradwatch.catalog import END_STATES
from tests.ops.cluster_support.pod import PLACE, Container, Pod, refusal
from tests.ops.cluster_support.rendering import K8S
from tests.services import MlflowServer, eventually, fetch

GROUP, TRAINER, AGENT = 10001, 20000, 10001
#: The trainer's own share of the pod's grace period, in the manifests 30 seconds.
GRACE = 3.0
#: Trains so many steps, tells, and then does as its second word says.
TRAINING = """\
import signal, sys, time, torch, gradwatch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
told = []
if sys.argv[2] == "graceful":
    signal.signal(signal.SIGTERM, lambda *_: told.append(True))
with gradwatch.watch(model, optimizer, model_name="pod", max_norm=1.0) as run:
    def train(steps):
        for _ in range(steps):
            loss = model(torch.randn(8, 4)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            run.log_train(loss=loss)
    train(int(sys.argv[1]))
    print("trained", flush=True)
    if sys.argv[2] == "fail":
        raise RuntimeError("no more data")
    while sys.argv[2] != "end" and not told:
        time.sleep(0.05)
"""


class TrainingPod(Pod):
    """A trainer, and the sidecar of `k8s/components/sidecar` beside it."""

    def __init__(self, directory: Path, run: str, mlflow: str) -> None:
        template = yaml.safe_load((K8S / "components/sidecar/job.yaml").read_text())["spec"]["template"]["spec"]
        [self._sidecar] = template["initContainers"]
        sizes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in template["volumes"]}
        volumes = {name: int(sizes[f"gradwatch-{name}"].removesuffix("Mi")) for name in ("journal", "state")}
        super().__init__(directory, template["securityContext"]["fsGroup"], volumes)
        self.run, self.mlflow, self.log = run, mlflow, directory / "agent.log"

    def trainer(self, steps: int, then: str, user: int = TRAINER) -> Container:
        """A trainer that has done its steps."""
        journal = str(PLACE / "journal")
        container = self.start(
            [sys.executable, "-c", TRAINING, str(steps), then], self.directory / "trainer.log", user,
            {"GRADWATCH_DIR": journal, "JOB_UID": self.run, "HOME": "/tmp"},
        )  # fmt: skip
        assert container.output.readline() == "trained\n", (self.directory / "trainer.log").read_text()
        return container

    def agent(self, linger: int = 20) -> Container:
        here = {
            "--dir=/journal": f"--dir={PLACE}/journal",
            "--state=/var/lib/gradwatch": f"--state={PLACE}/state",
            "--listen=$(POD_IP):9460": "--listen=127.0.0.1:0",
            "--linger=45": f"--linger={linger}",
            "--grace=55": f"--grace={linger + 10}",
        }
        args = [here.get(arg, arg) for arg in self._sidecar["args"]]
        assert set(here.values()) <= set(args)
        mounts = {mount["name"]: mount for mount in self._sidecar["volumeMounts"]}
        assert mounts["gradwatch-journal"]["readOnly"]
        code = "from gradwatch.cli import main; main()"
        environment = {"MLFLOW_TRACKING_URI": self.mlflow, "HOME": "/tmp", "TMPDIR": f"{PLACE}/state"}
        return self.start(
            [sys.executable, "-c", code, "agent", *args], self.log, AGENT, environment, read_only=["journal"]
        )

    # -- what is seen from outside

    def shown(self) -> tuple[str, float]:
        """State and steps of one scrape of the agent that was started last; empty and 0 where none is answered."""

        def address() -> str | None:
            lines = [line for line in self.log.read_text().splitlines() if " listen address=" in line]
            return lines[-1].partition("address=")[2].split()[0] if lines else None

        lines = (fetch(eventually(address, "the agent listens") + "/metrics") or "").splitlines()
        states = [line for line in lines if line.startswith("gradwatch_run_state{") and line.endswith(" 1.0")]
        steps = [float(line.rpartition(" ")[2]) for line in lines if line.startswith("gradwatch_steps_total{")]
        return states[0].partition('state="')[2].partition('"')[0] if states else "", sum(steps)

    def mlflow_run(self) -> Run | None:
        client = MlflowClient(self.mlflow)
        ids = [each.experiment_id for each in client.search_experiments()]
        found = client.search_runs(ids, f"tags.`gradwatch.run` = '{self.run}'")
        assert len(found) <= 1
        return found[0] if found else None

    def ends(self, agent: Container) -> tuple[str, float, str]:
        """Tell the sidecar to stop, as the kubelet does last: what its last scrape shows, and MLflow afterwards."""
        eventually(lambda: self.shown()[1] > 0, "somebody scrapes, so that the sidecar waits for a last scrape")
        agent.send(signal.SIGTERM)
        eventually(lambda: f"end run={self.run} " in self.log.read_text(), "the end is read")
        seen = eventually(lambda: (now := self.shown())[0] in END_STATES and now, "a last scrape shows the end")
        assert isinstance(seen, tuple)
        assert agent.wait(30) == 0
        assert "undelivered=0" in self.log.read_text()
        run = self.mlflow_run()
        return (*seen, str(run.info.status) if run else "")


@pytest.fixture
def pod(tmp_path: Path, mlflow_server: MlflowServer) -> Iterator[TrainingPod]:
    why = refusal()
    if why is not None:
        pytest.skip(f"no pod of namespaces here: {why}")
    made = TrainingPod(tmp_path, f"job-{uuid.uuid4()}", mlflow_server.url)
    yield made
    made.remove()


@pytest.mark.parametrize("user", [TRAINER, 0], ids=["another-user", "root"])
def test_a_job_completes(pod: TrainingPod, user: int) -> None:
    agent = pod.agent()
    trainer = pod.trainer(200, "end", user)
    assert trainer.wait() == 0
    assert pod.ends(agent) == ("finished", 200, "FINISHED")
    journals = [path for path in pod.seen("journal").rglob("*") if path.is_file()]
    assert len(journals) > 3
    assert {(path.stat().st_gid, path.stat().st_mode & 0o777) for path in journals} == {(GROUP, 0o640)}


def test_an_exception_is_a_failure(pod: TrainingPod) -> None:
    agent = pod.agent()
    assert pod.trainer(100, "fail").wait() == 1
    assert pod.ends(agent) == ("failed", 100, "FAILED")


def test_a_trainer_that_is_killed_is_told_by_the_agent_that_lives(pod: TrainingPod) -> None:
    """As at the end of its memory: the container is gone, the pod is not."""
    agent = pod.agent()
    trainer = pod.trainer(100, "stay")
    trainer.send(signal.SIGKILL)
    assert trainer.wait() != 0
    assert agent.running
    assert pod.ends(agent) == ("abrupt", 100, "FAILED")


def test_a_container_that_starts_again_after_a_kill_is_the_next_attempt(pod: TrainingPod) -> None:
    agent = pod.agent()
    trainer = pod.trainer(100, "stay")
    trainer.send(signal.SIGKILL)
    trainer.wait()
    # The second one has no checkpoint: it trains the hundred steps again, which count once.
    assert pod.trainer(150, "end").wait() == 0
    assert pod.ends(agent) == ("finished", 150, "FINISHED")
    run = pod.mlflow_run()
    assert run is not None
    assert run.data.tags["gradwatch.attempt"] == "1"


def test_who_heeds_sigterm_ends_within_its_grace_period(pod: TrainingPod) -> None:
    agent = pod.agent()
    assert pod.trainer(100, "graceful").stop(GRACE) == 0
    assert pod.ends(agent) == ("finished", 100, "FINISHED")


def test_who_does_not_heed_sigterm_is_killed_after_it(pod: TrainingPod) -> None:
    """As number 1 of its container it does not even die of a SIGTERM that it does not handle."""
    agent = pod.agent()
    assert pod.trainer(100, "stay").stop(GRACE) != 0
    assert pod.ends(agent) == ("killed", 100, "KILLED")


def test_both_are_told_at_once(pod: TrainingPod) -> None:
    """As when a node shuts down: the sidecar stays until its trainer has ended."""
    agent = pod.agent()
    trainer = pod.trainer(100, "graceful")
    eventually(lambda: pod.shown() == ("running", 100), "all steps are counted")
    agent.send(signal.SIGTERM)
    eventually(lambda: pod.shown()[0] == "running", "the sidecar still serves")
    assert agent.running
    assert trainer.stop(GRACE) == 0
    assert pod.ends(agent) == ("finished", 100, "FINISHED")


def test_an_agent_that_is_killed_in_mid_run_is_followed_by_one_that_counts_on(pod: TrainingPod) -> None:
    first = pod.agent()
    trainer = pod.trainer(100, "graceful")
    eventually(lambda: pod.shown() == ("running", 100), "all steps are counted")
    before = eventually(pod.mlflow_run, "MLflow has the run").info.run_id
    first.send(signal.SIGKILL)
    first.wait()
    pod.log.write_text("")
    second = pod.agent()
    assert pod.shown() == ("running", 100)
    assert trainer.stop(GRACE) == 0
    assert pod.ends(second) == ("finished", 100, "FINISHED")
    run = pod.mlflow_run()
    assert run is not None
    assert run.info.run_id == before


def test_the_journal_is_read_only_for_the_agent_and_closed_to_who_is_not_of_the_group(pod: TrainingPod) -> None:
    pod.trainer(10, "end").wait()
    journal = next(pod.seen("journal").rglob("steps.ring"))
    inside = str(PLACE / "journal" / journal.relative_to(pod.seen("journal")))
    write = [sys.executable, "-c", f"open({inside!r}, 'r+b')"]
    log = pod.directory / "tried.log"
    assert pod.start(write, log, TRAINER, {}, read_only=["journal"]).wait() == 1
    assert "Read-only file system" in log.read_text()
    pod.group = GROUP + 1
    read = [sys.executable, "-c", f"open({inside!r}, 'rb')"]
    assert pod.start(read, log, AGENT + 1, {}).wait() == 1
    assert "Permission denied" in log.read_text()
