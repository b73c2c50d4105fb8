"""A pod's life with real processes, told to stop as the kubelet tells them: the trainer first, its sidecar after it.

The sidecar's command line is the one of `k8s/components/sidecar`, on loopback and with a shorter wait. Where the tests
run as root, trainer and agent are two users that share a group through a setgid directory, as `fsGroup` makes it. These
tests need no namespaces; `test_pod_containers.py` has the rest, where the sandbox allows them.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.ops.cluster_support.rendering import K8S, ROOT
from tests.services import eventually, fetch

GROUP, TRAINER, AGENT = 10001, 20000, 10001
#: Another user, of the shared group, who may write only where that group or everybody may. May read everything, since
#: the directory where this Python is may be closed to others.
BECOME = (
    "setpriv", "--reuid={user}", "--regid={user}", f"--groups={GROUP}",
    "--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search", "--bounding-set=-all,+dac_read_search",
)  # fmt: skip
TRAINING = """\
import sys, time, torch, gradwatch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with gradwatch.watch(model, optimizer, model_name="pod", max_norm=1.0) as run:
    for step in range(int(sys.argv[1])):
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.log_train(loss=loss)
    print("trained", flush=True)
    if len(sys.argv) > 2:
        time.sleep(120)
"""


class Pod:
    """A journal and a state volume, a trainer and a sidecar beside it."""

    def __init__(self, directory: Path) -> None:
        self.journal, self.state, self.log = directory / "journal", directory / "state", directory / "agent.log"
        self.journal.mkdir()
        self.state.mkdir()
        self.started: list[subprocess.Popen[str]] = []
        self.root = os.geteuid() == 0
        if self.root:
            for parent in (directory, *directory.parents[:3]):
                if parent.stat().st_uid == os.geteuid() and parent != Path("/tmp"):
                    parent.chmod(parent.stat().st_mode | 0o055)
            # What the kubelet does to an emptyDir for a pod's fsGroup.
            for volume in (self.journal, self.state):
                os.chown(volume, 0, GROUP)
                volume.chmod(0o2777)

    def start(self, code: str, args: list[str], user: int, **more: str) -> subprocess.Popen[str]:
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "agent"), "HOME": str(self.state)}
        environment |= {"JOB_UID": "job-1", **more}
        become = [word.format(user=user) for word in BECOME] if self.root and user else []
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [*become, sys.executable, "-c", code, *args], env=environment, cwd="/", text=True,
                stdout=subprocess.PIPE, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def trainer(self, steps: int, user: int = TRAINER, stay: bool = False) -> subprocess.Popen[str]:
        return self.start(TRAINING, [str(steps), *(["stay"] if stay else [])], user, GRADWATCH_DIR=str(self.journal))

    def agent(self, linger: int = 20) -> subprocess.Popen[str]:
        job = yaml.safe_load((K8S / "components/sidecar/job.yaml").read_text())
        [said] = job["spec"]["template"]["spec"]["initContainers"]
        here = {
            "--dir=/journal": f"--dir={self.journal}",
            "--state=/var/lib/gradwatch": f"--state={self.state}",
            "--listen=$(POD_IP):9460": "--listen=127.0.0.1:0",
            "--linger=45": f"--linger={linger}",
            "--grace=55": f"--grace={linger + 10}",
        }
        args = [here.get(arg, arg) for arg in said["args"]]
        assert set(here.values()) <= set(args)
        return self.start("from gradwatch.cli import main; main()\n", ["agent", *args], AGENT)

    def url(self) -> str:
        def said() -> str | None:
            lines = [line for line in self.log.read_text().splitlines() if " listen address=" in line]
            return lines[-1].partition("address=")[2].split()[0] if lines else None

        return str(eventually(said, "the agent listens"))

    def metrics(self) -> str:
        return fetch(self.url() + "/metrics") or ""


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    made = Pod(tmp_path)
    yield made
    for process in made.started:
        if process.poll() is None:
            process.kill()
        process.wait(10)


def stop(agent: subprocess.Popen[str]) -> int:
    agent.send_signal(signal.SIGTERM)
    return agent.wait(30)


def test_a_job_completes_and_its_end_is_told(pod: Pod) -> None:
    agent = pod.agent()
    trainer = pod.trainer(300)
    assert trainer.wait(60) == 0
    # The kubelet tells the sidecar at once when the last container has ended; nobody scraped, so it does not wait.
    assert stop(agent) == 0
    assert "end run=job-1 attempt=0 state=finished step=299" in pod.log.read_text()


def test_who_is_scraped_waits_for_a_last_scrape(pod: Pod) -> None:
    agent = pod.agent()
    pod.metrics()
    assert pod.trainer(100).wait(60) == 0
    agent.send_signal(signal.SIGTERM)
    eventually(lambda: "state=finished" in pod.log.read_text(), "the end is read")
    text = eventually(pod.metrics, "it still answers")
    assert any('state="finished"' in line and line.endswith(" 1.0") for line in text.splitlines())
    assert agent.wait(10) == 0
    assert "undelivered=0" in pod.log.read_text()


def test_a_trainer_killed_for_its_memory_is_told_by_the_agent_that_lives(pod: Pod) -> None:
    agent = pod.agent()
    trainer = pod.trainer(200, stay=True)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == "trained\n"
    trainer.kill()
    trainer.wait(10)
    assert stop(agent) == 0
    log = pod.log.read_text()
    assert "end run=job-1 attempt=0" in log
    assert "state=finished" not in log
    assert "step=199" in log


def test_the_agent_writes_nothing_into_the_journal(pod: Pod) -> None:
    agent = pod.agent()
    assert pod.trainer(50).wait(60) == 0
    before = {path: path.stat().st_mtime_ns for path in pod.journal.rglob("*")}
    assert stop(agent) == 0
    assert {path: path.stat().st_mtime_ns for path in pod.journal.rglob("*")} == before
    if pod.root:
        owners = {path.stat().st_uid for path in pod.journal.rglob("*")}
        groups = {path.stat().st_gid for path in pod.journal.rglob("*")}
        assert (owners, groups) == ({TRAINER}, {GROUP})
