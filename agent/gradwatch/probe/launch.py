"""The agent beside the training: started once a root, never waited for, left to finish by itself.

The agent is a process of its own: own session, no standard streams of ours (an
inherited stdout keeps pipes open for seconds), no descriptor of ours, working
directory in the root. It holds ``agent.lock`` in its state directory for life;
a root whose lock is held has one. It says where it listens in ``agent.json``.

========================  ====================================================
``GRADWATCH_DIR``         the journal's root; a sidecar reads it, none is started
``GRADWATCH_AGENT=0``     none is started
``GRADWATCH_PARENT``      set by ``gradwatch run``, which is the agent itself
========================  ====================================================

The agent outlives its trainer to drain, except where the trainer's end takes
it along: PID 1 of a container, what PID 1 waits for, and Slurm's cleaning up.
There the end of the interpreter waits for the drain, and so does the end of a
run in a PID 1, which may leave without a word; both are bounded.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import site
import stat
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import gradwatch
from gradwatch.journal.liveness import Lock, is_locked
from gradwatch.probe.identity import absolute_uri, mlflow_target

STATE: Final = ".agent"
LOCK: Final = "agent.lock"
ADDRESS: Final = "agent.json"
LOG: Final = "agent.log"
_SPAWN_LOCK: Final = "spawn.lock"
_SPAWNED: Final = "spawned"

#: Seconds for which an agent that was just started is trusted to take its lock.
GRACE: Final = 20.0
#: Seconds for which the end of a trainer waits for the drain, where it takes the agent along.
DRAIN_SECONDS: Final = 10.0
_LOG_LIMIT: Final = 4 * 2**20
#: What the agent imports that the trainer may lack.
_NEEDED: Final = ("prometheus_client", "typer", "rich")
#: File systems on other machines: writing there may wait for a network.
_REMOTE: Final = ("nfs", "cifs", "smb", "lustre", "gpfs", "beegfs", "ceph", "fuse", "9p", "afs", "pvfs", "wekafs")
#: Inode of the initial PID namespace on every Linux machine (PROC_PID_INIT_INO).
_INITIAL_PID_NAMESPACE: Final = 0xEFFFFFFC


@dataclass(slots=True)
class AgentHandle:
    """An agent that this process started."""

    pid: int
    root: Path
    #: Whether it dies when this process does, so that its drain must be waited for.
    dies_with_us: bool = False
    _owner: int = field(default_factory=os.getpid)
    _gone: bool = False
    _ended_at: float = field(default_factory=time.time)

    def alive(self) -> bool:
        """Whether it runs; reaps it where it has ended, so that no zombie stays behind."""
        if not self._gone and os.getpid() == self._owner:
            try:
                self._gone = os.waitpid(self.pid, os.WNOHANG)[0] != 0
            except OSError:  # reaped by somebody else
                self._gone = True
        return not self._gone

    @property
    def address(self) -> str | None:
        """Where it listens, like ``127.0.0.1:9460``; None while it does not."""
        return agent_address(self.root)

    def finished(self, run: str | None = None, *, wait: bool = True) -> None:
        """A run has ended. Waits for its drain in a PID 1; elsewhere nothing waits but the interpreter's end."""
        self._ended_at = time.time()
        if wait and os.getpid() == 1 and self.alive():
            self.wait_drained(run=run)

    def wait_drained(
        self,
        timeout: float = DRAIN_SECONDS,
        run: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> bool:
        """Wait until the agent has delivered what was written, or has left; False when time was up first.

        Drained means that ``agent.json``, read anew, has in ``"drained"``, a
        mapping of run to Unix time, a time behind the end of ``run`` (of any
        run, where None): the agent saw the end, and no sink holds more of it.
        """
        until = clock() + timeout
        while self.alive():
            if self._drained(run):
                return True
            if clock() >= until:
                return False
            sleep(0.05)
        return True

    def _drained(self, run: str | None) -> bool:
        drained = agent_document(self.root).get("drained")
        times = drained.values() if run is None and isinstance(drained, dict) else []
        if run is not None and isinstance(drained, dict):
            times = [drained.get(run)]
        return any(isinstance(at, int | float) and at >= self._ended_at for at in times)


_started: dict[Path, AgentHandle] = {}
_warned: set[str] = set()


def _before_exit() -> None:
    """Give the agents that would die with this process their time; runs behind the hooks that tell the end."""
    for handle in _started.values():
        if handle.dies_with_us and handle.alive():
            handle.wait_drained()


atexit.register(_before_exit)


def ensure_agent(root: Path, env: Mapping[str, str] | None = None) -> AgentHandle | None:
    """See that an agent reads the journals below ``root``; call it when the run's journal stands.

    Returns the handle of one that this process has started, now or before;
    None where it must not (see the module), where another holds the lock, or
    where it could not, which is said once. Never raises, never waits.
    """
    env = os.environ if env is None else env
    try:
        if env.get("GRADWATCH_DIR") or env.get("GRADWATCH_PARENT"):
            return None
        if env.get("GRADWATCH_AGENT", "1").strip().lower() in ("0", "no", "off", "false"):
            return None
        if env.get("LOCAL_RANK", env.get("SLURM_LOCALID", "0")).strip() not in ("", "0"):
            return None
        return _ensure(Path(root), env)
    except Exception as error:
        _warn(f"the agent could not be started ({type(error).__name__}: {error}); training and recording go on")
        return None


def _ensure(root: Path, env: Mapping[str, str]) -> AgentHandle | None:
    state = root / STATE
    known = _started.get(root)
    if known is not None and known.alive():
        return known
    if is_locked(state / LOCK):
        return None
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        _warn(
            f"no agent: {', '.join(missing)} not installed; training is recorded, and shown once an agent reads it. "
            "pip install 'gradwatch[agent]', or set GRADWATCH_AGENT=0"
        )
        return None
    if not sys.executable:
        _warn("no agent: this interpreter has no executable; run `gradwatch agent` beside it")
        return None
    state.mkdir(mode=0o700, exist_ok=True)
    try:
        turn = Lock(state / _SPAWN_LOCK)  # ranks and runs of one node start at once; one of them starts the agent
    except BlockingIOError:
        return None
    try:
        if _just_spawned(state):
            return None
        pid = _spawn(root, state, env)
        _note_spawned(state, pid)
    finally:
        turn.release()
    handle = AgentHandle(pid, root, dies_with_us(env))
    _started[root] = handle
    return handle


def _spawn(root: Path, state: Path, env: Mapping[str, str]) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    log_path = state / LOG
    grown = log_path.exists() and log_path.stat().st_size > _LOG_LIMIT
    log = os.open(log_path, flags | (os.O_TRUNC if grown else os.O_APPEND), 0o600)
    try:
        process = subprocess.Popen(
            _command(root, env),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=root,
            env=_agent_environment(env),
            start_new_session=True,
            close_fds=True,
        )
    finally:
        os.close(log)
    # It is meant to outlive this object, which would complain about that; `AgentHandle` reaps it.
    process.returncode = 0
    return process.pid


def _command(root: Path, env: Mapping[str, str]) -> list[str]:
    command = [sys.executable, "-P", "-m", "gradwatch", "agent", "--dir", str(root.absolute()), "--until-done"]
    return [*command, "--listen", env["GRADWATCH_LISTEN"]] if env.get("GRADWATCH_LISTEN") else command


def _agent_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The trainer's environment, for another working directory, without its appetite for threads."""
    result = dict(env)
    paths = [os.path.abspath(path) for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]  # noqa: PTH100
    source = Path(gradwatch.__file__).resolve().parent.parent
    if str(source) not in [*site.getsitepackages(), site.getusersitepackages()]:
        paths.append(str(source))  # a checkout that is on our path in a way that it will not be on the agent's
    if paths:
        result["PYTHONPATH"] = os.pathsep.join(paths)
    result |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    uri = mlflow_target(env).secret_uri  # by the environment, since everybody can read a command line
    if uri:
        result["MLFLOW_TRACKING_URI"] = uri
    if env.get("MLFLOW_REGISTRY_URI"):
        result["MLFLOW_REGISTRY_URI"] = absolute_uri(env["MLFLOW_REGISTRY_URI"])
    return result


def _just_spawned(state: Path) -> bool:
    """Whether another process has started an agent here that lives and has not yet had time to take its lock."""
    try:
        path = state / _SPAWNED
        pid = int(path.read_text()[:20])
        if not 0 <= time.time() - path.stat().st_mtime <= GRACE:
            return False
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except PermissionError:
        return True
    except (OSError, ValueError, IndexError):
        return False


def _note_spawned(state: Path, pid: int) -> None:
    path = state / _SPAWNED
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(str(pid))


def dies_with_us(env: Mapping[str, str] | None = None) -> bool:
    """Whether the end of this process takes its children along.

    True for PID 1, for whatever runs in a PID namespace (a container ends with
    its main process, and that is this one or waits for it), and in a Slurm job.
    """
    env = os.environ if env is None else env
    if os.getpid() == 1 or env.get("SLURM_JOB_ID"):
        return True
    try:
        return os.stat("/proc/self/ns/pid").st_ino != _INITIAL_PID_NAMESPACE  # noqa: PTH116
    except OSError:
        return False


# -- where the agent is


def agent_document(root: Path) -> dict[str, Any]:
    """What the agent of a root says of itself in ``agent.json``; empty where there is nothing to read."""
    try:
        fd = os.open(root / STATE / ADDRESS, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            document = json.loads(file.read(65_536))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def agent_address(root: Path) -> str | None:
    """Where the agent of a root listens, like ``127.0.0.1:9460``; None where none lives there."""
    if not is_locked(root / STATE / LOCK):
        return None
    address = agent_document(root).get("address")
    return address if isinstance(address, str) else None


# -- where journals are


def default_root(env: Mapping[str, str] | None = None) -> Path:
    """The directory of journals, created 0700: ``GRADWATCH_DIR``, else one of the user's on a local disk.

    That is ``$XDG_STATE_HOME/gradwatch`` or ``~/.local/state/gradwatch``; where
    this is on a file system over the network, or cannot be written, one in the
    directory for temporary files, which nobody else could have put there.
    """
    env = os.environ if env is None else env
    if env.get("GRADWATCH_DIR"):
        return Path(env["GRADWATCH_DIR"]).absolute()
    home = env.get("XDG_STATE_HOME") or (f"{env['HOME']}/.local/state" if env.get("HOME") else "")
    if home and Path(home).is_absolute():
        root = Path(home) / "gradwatch"
        if not _is_remote(root) and _own(root):
            return root
    base = Path(tempfile.gettempdir())
    root = base / f"gradwatch-{os.getuid()}"
    return root if _own(root) else Path(tempfile.mkdtemp(prefix="gradwatch-", dir=base))


def _own(root: Path) -> bool:
    """Create ``root`` if need be; whether it is a directory of ours that we can write and others cannot."""
    try:
        root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        root.mkdir(mode=0o700, exist_ok=True)
        facts = root.lstat()
    except OSError:
        return False
    writable_by_others = facts.st_mode & stat.S_IWOTH
    ours = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid() and not writable_by_others
    return ours and os.access(root, os.W_OK | os.X_OK)


def _is_remote(path: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """Whether ``path`` is on another machine's disk, by the longest mount point above it."""
    best, kind = "", ""
    place = os.path.realpath(path)
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return False
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        point = fields[1].replace("\\040", " ")
        if (place == point or place.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, kind = point, fields[2]
    return kind.startswith(_REMOTE) and kind != "fuse-overlayfs"


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        try:
            warnings.warn(f"gradwatch: {message}", RuntimeWarning, stacklevel=4)
        except Warning:  # under -W error a warning of ours is still no failure of the training
            pass
