"""The agent is started once, beside the training and out of its way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gradwatch.journal.liveness import is_locked
from gradwatch.probe import launch
from gradwatch.probe.launch import agent_address, default_root, ensure_agent

STAND_IN = """
import json, os, sys, time
from pathlib import Path
from gradwatch.journal.liveness import Lock
root = Path(sys.argv[1]); state = root / ".agent"
with open(state / "starts", "a") as file:
    file.write(f"{os.getpid()}\\n")
print("said aloud", flush=True)
try:
    lock = Lock(state / "agent.lock")
except BlockingIOError:
    sys.exit(3)
(state / "seen.json").write_text(json.dumps({
    "cwd": os.getcwd(), "session": os.getsid(0), "pid": os.getpid(), "env": dict(os.environ),
    "fds": {fd: os.readlink(f"/proc/self/fd/{fd}") for fd in ("0", "1", "2")},
    "open": [str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.exists()],
}))
(state / "agent.json.tmp").write_text(json.dumps({"address": "127.0.0.1:9", "pid": os.getpid(), "drained": {}}))
(state / "agent.json.tmp").rename(state / "agent.json")
until = time.monotonic() + 60
while time.monotonic() < until and not (state / "leave").exists():
    time.sleep(0.02)
"""


def eventually(fact: Callable[[], object], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    root = tmp_path / "root"
    root.mkdir()
    monkeypatch.setattr(launch, "_command", lambda root, env: [sys.executable, str(script), str(root)])
    monkeypatch.setattr(launch, "_started", {})
    monkeypatch.setattr(launch, "_warned", set())
    yield root
    if (root / ".agent").exists():
        (root / ".agent" / "leave").touch()
        handle = launch._started.get(root)
        eventually(lambda: (handle is None or not handle.alive()) and not is_locked(root / ".agent" / "agent.lock"))


def starts(root: Path) -> list[str]:
    path = root / ".agent" / "starts"
    return path.read_text().split() if path.exists() else []


def seen(root: Path) -> dict[str, object]:
    eventually(lambda: agent_address(root))
    document: dict[str, object] = json.loads((root / ".agent" / "seen.json").read_text())
    return document


ENV = {"PATH": os.environ["PATH"], "HOME": "/nowhere"}


def test_an_agent_stands_apart_from_the_training(root: Path) -> None:
    with open(root / "held by the trainer", "w") as held:
        os.set_inheritable(held.fileno(), True)
        handle = ensure_agent(root, ENV)
        assert handle is not None
        told = seen(root)
    assert told["pid"] == told["session"] == handle.pid
    assert told["session"] != os.getsid(0)
    assert told["cwd"] == str(root)
    log = str(root / ".agent" / "agent.log")
    assert told["fds"] == {"0": "/dev/null", "1": log, "2": log}
    assert not any("held by" in path for path in told["open"])  # type: ignore[attr-defined]
    assert handle.address == "127.0.0.1:9"
    assert handle.alive()
    eventually(lambda: "said aloud" in Path(log).read_text())
    for path, mode in ((root / ".agent", 0o700), (Path(log), 0o600)):
        assert path.stat().st_mode & 0o777 == mode


def test_it_is_started_once(root: Path) -> None:
    first = ensure_agent(root, ENV)
    assert ensure_agent(root, ENV) is first
    launch._started.clear()  # as another process
    assert ensure_agent(root, ENV) is None  # it was just spawned, whether or not it holds its lock yet
    seen(root)
    (root / ".agent" / "spawned").unlink()
    assert ensure_agent(root, ENV) is None  # it holds its lock
    assert len(starts(root)) == 1
    assert first is not None
    launch._started[root] = first


def test_processes_that_start_together_start_one_agent(root: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gradwatch.probe import launch\n"
        f"launch._command = lambda root, env: [sys.executable, {str(tmp_path / 'stand_in.py')!r}, str(root)]\n"
        "launch.dies_with_us = lambda env: False\n"
        "print(launch.ensure_agent(Path(sys.argv[1])) is not None)\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("GRADWATCH")}
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE, text=True, env=env)
        for _ in range(4)
    ]
    outcomes = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert sorted(outcomes) == ["False", "False", "False", "True"]
    seen(root)
    assert len(starts(root)) == 1  # and it outlived the process that started it


def test_one_that_died_is_started_anew_and_leaves_no_zombie(root: Path) -> None:
    first = ensure_agent(root, ENV)
    assert first is not None
    seen(root)
    os.kill(first.pid, signal.SIGKILL)
    eventually(lambda: not first.alive())
    assert not Path(f"/proc/{first.pid}").exists()
    assert agent_address(root) is None  # its file still stands there, its lock does not
    second = ensure_agent(root, ENV)
    assert second is not None
    assert second.pid != first.pid


@pytest.mark.parametrize(
    "env",
    [
        {"GRADWATCH_DIR": "/somewhere"},
        {"GRADWATCH_AGENT": "0"},
        {"GRADWATCH_AGENT": "off"},
        {"GRADWATCH_PARENT": "77"},
        {"LOCAL_RANK": "1"},
        {"SLURM_LOCALID": "3"},
    ],
)
def test_none_is_started_where_none_is_wanted(env: dict[str, str], root: Path) -> None:
    assert ensure_agent(root, {**ENV, **env}) is None
    assert not (root / ".agent").exists()


def test_a_lock_that_another_holds_is_an_agent(root: Path) -> None:
    state = root / ".agent"
    state.mkdir()
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from gradwatch.journal.liveness import Lock\n"
            "lock = Lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()",
            str(state / "agent.lock"),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert ensure_agent(root, ENV) is None
        assert starts(root) == []
    finally:
        holder.communicate(timeout=30)


def test_missing_packages_are_said_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_NEEDED", ("prometheus_client", "no_such_package"))
    with pytest.warns(RuntimeWarning, match=r"no_such_package.*pip install 'gradwatch\[agent\]'"):
        assert ensure_agent(root, ENV) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ensure_agent(root, ENV) is None
        launch._warned.clear()
        assert ensure_agent(root, ENV) is None  # a warning that is an error is still none of the training's


def test_a_root_that_cannot_be_written_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_warned", set())
    file = tmp_path / "a file"
    file.touch()
    with pytest.warns(RuntimeWarning, match="could not be started"):
        assert ensure_agent(file, ENV) is None


def test_the_agents_environment(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = {**ENV, "PYTHONPATH": "here::/there", "MLFLOW_TRACKING_URI": "sqlite:///a.db", "OMP_NUM_THREADS": "16"}
    result = launch._agent_environment(env)
    assert result["PYTHONPATH"].split(os.pathsep)[:2] == [str(tmp_path / "here"), "/there"]
    assert result["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/a.db"
    assert result["OMP_NUM_THREADS"] == "1"
    secret = {**ENV, "MLFLOW_TRACKING_URI": "http://bob:hunter2@mlflow"}
    assert launch._agent_environment(secret)["MLFLOW_TRACKING_URI"] == secret["MLFLOW_TRACKING_URI"]


def test_the_command_is_the_agents(monkeypatch: pytest.MonkeyPatch) -> None:
    command = launch._command(
        Path("/r"), {"GRADWATCH_LISTEN": "127.0.0.1:0", "MLFLOW_TRACKING_URI": "http://b:hunter2@m"}
    )
    assert command[2:] == ["-m", "gradwatch", "agent", "--dir", "/r", "--until-done", "--listen", "127.0.0.1:0"]
    assert "hunter2" not in " ".join(command)


# -- the drain


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_waiting_for_the_drain_is_bounded(root: Path) -> None:
    handle = ensure_agent(root, ENV)
    assert handle is not None
    seen(root)
    clock = Clock()
    assert handle.wait_drained(timeout=10, clock=clock, sleep=clock.sleep) is False
    assert 10 <= clock.now < 10.2


def test_the_drain_is_over_when_the_agent_says_so_of_this_end(root: Path) -> None:
    handle = ensure_agent(root, ENV)
    assert handle is not None
    seen(root)
    clock = Clock()

    def say(at: float) -> None:
        (root / ".agent" / "agent.json").write_text(json.dumps({"drained": {"run-a": at}}))

    ended = time.time()
    handle.finished("run-a")
    say(ended - 60)  # of an earlier end
    assert handle.wait_drained(run="run-a", clock=clock, sleep=clock.sleep) is False
    say(time.time())
    for run, drained in (("run-a", True), (None, True), ("run-b", False)):
        assert handle.wait_drained(run=run, clock=clock, sleep=clock.sleep) is drained


def test_the_drain_is_over_when_the_agent_has_left(root: Path) -> None:
    handle = ensure_agent(root, ENV)
    assert handle is not None
    seen(root)
    (root / ".agent" / "leave").touch()
    eventually(lambda: not handle.alive())
    clock = Clock()
    assert handle.wait_drained(clock=clock, sleep=clock.sleep) is True
    assert clock.now == 0


@pytest.mark.parametrize("dies", [True, False])
def test_the_interpreters_end_waits_behind_the_hooks_only_where_it_must(dies: bool, root: Path, tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from gradwatch.probe import ends, launch
launch._command = lambda root, env: [sys.executable, {str(tmp_path / "stand_in.py")!r}, str(root)]
launch.dies_with_us = lambda env: {dies}
launch.AgentHandle.wait_drained = lambda self: print("waited")
watch = ends.watch_process_end(lambda end: print("told", end.state))
launch.ensure_agent(Path(sys.argv[1]))
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith("GRADWATCH")}
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout.split("\n")[:-1] == (["told finished", "waited"] if dies else ["told finished"])
    assert done.stderr == ""
    seen(root)


def test_slurm_takes_the_agent_along() -> None:
    assert launch.dies_with_us({"SLURM_JOB_ID": "7"}) is True


# -- addresses and roots


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"address": 7}', b"\xff" * 99, b"[" * 60_000])
def test_a_strange_address_file_is_no_address(content: bytes, root: Path) -> None:
    state = root / ".agent"
    state.mkdir()
    (state / "agent.json").write_bytes(content)
    assert agent_address(root) is None
    assert not isinstance(launch.agent_document(root).get("address"), str)


def test_the_default_root_is_the_users_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_is_remote", lambda path: "network" in str(path))
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: str(tmp_path))
    state = tmp_path / "state"
    root = default_root({"XDG_STATE_HOME": str(state), "HOME": "/nowhere"})
    assert root == state / "gradwatch"
    assert root.stat().st_mode & 0o777 == 0o700
    assert default_root({"HOME": str(tmp_path / "h")}) == tmp_path / "h/.local/state/gradwatch"
    assert default_root({"GRADWATCH_DIR": str(tmp_path / "d"), "HOME": "/"}) == tmp_path / "d"
    private = tmp_path / f"gradwatch-{os.getuid()}"
    assert default_root({"HOME": str(tmp_path / "network")}) == private
    assert default_root({"XDG_STATE_HOME": "relative"}) == private
    assert default_root({}) == private
    assert private.stat().st_mode & 0o777 == 0o700


def test_a_temporary_root_that_others_can_write_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.tempfile, "gettempdir", lambda: str(tmp_path))
    trap = tmp_path / f"gradwatch-{os.getuid()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    trap.symlink_to(elsewhere)
    assert default_root({}) not in (trap, elsewhere)
    trap.unlink()
    trap.mkdir()
    trap.chmod(0o777)
    root = default_root({})
    assert root != trap
    assert root.stat().st_mode & 0o777 == 0o700


def test_a_file_system_over_the_network_is_known_by_its_mount(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/sda / ext4 rw 0 0\nfiler:/home /home nfs4 rw 0 0\n/dev/sdb /home/local xfs rw 0 0\n"
        "x /my\\040disk fuse.sshfs rw 0 0\nbad\n"
    )
    for path, remote in (
        ("/home/ada/x", True),
        ("/home", True),
        ("/homes", False),
        ("/home/local/x", False),
        ("/my disk/x", True),
        ("/x", False),
    ):
        assert launch._is_remote(Path(path), mounts) is remote


def test_a_handle_in_a_forked_child_reaps_nothing(root: Path) -> None:
    handle = ensure_agent(root, ENV)
    assert handle is not None
    child = os.fork()
    if child == 0:
        os._exit(0 if handle.alive() else 1)
    assert os.waitpid(child, 0)[1] == 0
