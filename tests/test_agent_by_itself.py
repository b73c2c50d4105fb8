"""A training with nothing set starts its agent by itself, which delivers and leaves; also where the port is taken."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from gradwatch.journal.liveness import is_locked
from tests.services import eventually

SCRIPT = """
import sys, torch, gradwatch
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = gradwatch.watch(model, optimizer, config={"batch_size": 4})
for _ in range(30):
    optimizer.zero_grad()
    loss = model(torch.randn(4, 2)).square().mean()
    loss.backward()
    optimizer.step()
    run.log_train(loss=loss)
for line in sys.stdin:  # the run lives until the test has seen enough
    pass
run.finish()
assert run.last_failure == "", run.last_failure
"""


@contextmanager
def training(tmp_path: Path) -> Iterator[Path]:
    """The script in a home of its own, alive within the block; the root that it uses."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GRADWATCH_")}
    environment |= {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", SCRIPT]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
        yield tmp_path / "state" / "gradwatch"
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def test_the_agent_comes_and_goes_by_itself(tmp_path: Path) -> None:
    with training(tmp_path) as root:

        def listed() -> bool:
            command = [sys.executable, "-m", "gradwatch", "runs", str(root)]
            told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout
            return "status page and /metrics: http://127.0.0.1:" in told

        eventually(listed, "the listing to tell the agent's address", 90)
    log = root / ".agent" / "agent.log"
    eventually(lambda: " end run=" in log.read_text(), "the agent to tell the end", 60)
    eventually(lambda: not is_locked(root / ".agent" / "agent.lock"), "the agent to leave", 90)
    assert "state=finished step=29" in log.read_text()


def test_a_taken_default_port_gives_another_one(tmp_path: Path) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # The default is 9460, which anybody on this machine may have: here it is a port that this test has.
        start = (
            f"import gradwatch.cli.agent as agent; agent.DEFAULT = '127.0.0.1:{port}'; from gradwatch.cli import main"
        )
        command = [sys.executable, "-c", f"{start}; main()", "agent", "--dir", str(tmp_path)]
        with (tmp_path / "log").open("wb") as log, subprocess.Popen(command, stderr=log) as process:
            try:
                eventually(lambda: "listen address=" in (tmp_path / "log").read_text(), "the agent to listen", 60)
            finally:
                process.terminate()
        assert f"http://127.0.0.1:{port} " not in (tmp_path / "log").read_text()
