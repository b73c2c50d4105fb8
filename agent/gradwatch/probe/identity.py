"""Who this training is: its run, its attempt, its place among the ranks.

The run's id is minted before the first step and never changes. It comes from
the first of these that is set, so that every rank finds the same one at once
and without talking:

========================  =====================================================
``GRADWATCH_RUN``         said by the user; wins always
``GRADWATCH_JOB_UID``     any job's id, for clusters that are not listed here
``JOBSET_UID``            Kubernetes JobSet: downward API,
                          ``metadata.labels['jobset.sigs.k8s.io/jobset-uid']``
``JOB_UID``               Kubernetes Job: downward API,
                          ``metadata.labels['batch.kubernetes.io/controller-uid']``
``TORCHELASTIC_RUN_ID``   torchrun, unless it is ``none``, its default
``SLURM_JOB_ID``          with cluster, array task, and step
the launcher              ranks of one node with none of these: the process that
                          started them, by boot id, pid and start time
a new id                  model, time and 40 random bits; sorts by time
========================  =====================================================

Kubernetes sets neither UID by itself; the manifests in ``k8s/`` do. Ranks on
several nodes with nothing shared in their environment cannot agree: each node
mints its own id, and `Identity.warning` says to set ``GRADWATCH_RUN``.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from gradwatch.probe.mlflow_target import MlflowTarget, absolute_uri, mlflow_target
from gradwatch.probe.names import run_name
from gradwatch.probe.secrets import scrub

__all__ = [
    "Identity",
    "MlflowTarget",
    "absolute_uri",
    "boot_id",
    "mlflow_target",
    "new_id",
    "resolve",
    "run_name",
    "safe_id",
    "slug",
]

_ID_LENGTH: Final = 128

#: Ids given out in this process: what it trains next is another run, whatever the environment says.
_given: set[str] = set()
os.register_at_fork(after_in_child=_given.clear)


@dataclass(frozen=True, slots=True)
class Identity:
    """A run's identity as one rank knows it.

    Attributes:
        run: the run's id, ``[A-Za-z0-9._-]{1,128}``; the same on every rank and in every attempt.
        run_name: a name for people.
        attempt: 0 for the first start of the run, one more for each that followed.
        rank, local_rank: place among all ranks, and among those of this node.
        world_size, local_world_size: how many there are of each.
        host: the node, ``NODE_NAME`` where the pod knows it, else the host name.
        boot_id: the kernel's; changes when the machine reboots.
        source: what the id came from, a variable's name, ``launcher`` or ``new``.
        attempt_source: the same for the attempt; ``journal`` or ``first`` where no variable told.
        local_rank_known: False where nothing told the local rank, and it was guessed.
        warning: what the user should know, in plain words, or "".
    """

    run: str
    run_name: str
    attempt: int = 0
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    host: str = ""
    boot_id: str = ""
    source: str = "new"
    attempt_source: str = "first"
    local_rank_known: bool = True
    warning: str = ""


def resolve(model_name: str, env: Mapping[str, str] | None = None, root: Path | None = None) -> Identity:
    """The identity of a run that starts now.

    Args:
        model_name: the model's name; part of a new id.
        env: the environment, ``os.environ`` by default.
        root: the journal's root, asked for earlier attempts where the environment tells none.
    """
    env = os.environ if env is None else env
    place = _place(env)
    run, source, warning = _run_id(model_name, env, place)
    base, number = run, 1
    while run in _given:
        number += 1
        run = safe_id(f"{base}-{number}")
    _given.add(run)
    attempt, attempt_source = _attempt(env, root, run, place.rank)
    name = env.get("GRADWATCH_RUN_NAME", "").strip()
    return replace(
        place,
        run=run,
        run_name=scrub(name)[:_ID_LENGTH] if name else run_name(run),
        attempt=attempt,
        attempt_source=attempt_source,
        source=source,
        warning=warning,
    )


def safe_id(text: str) -> str:
    """``text`` as ``[A-Za-z0-9._-]{1,128}``, with a hash of the original behind it where it had to change."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-") or "run"
    if plain == text and len(text) <= _ID_LENGTH:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[: _ID_LENGTH - 9].rstrip('.-')}-{digest}"


def slug(text: str, limit: int = 40) -> str:
    """A model's name for use within an id: lower case, dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:limit].strip("-") or "model"


def new_id(model_name: str, now: float | None = None) -> str:
    """A fresh id: sorts by time within a model, and 40 random bits keep simultaneous ones apart."""
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(now))
    return f"{slug(model_name)}-{stamp}-{secrets.token_hex(5)}"


# -- the run


def _run_id(model_name: str, env: Mapping[str, str], place: Identity) -> tuple[str, str, str]:
    for variable in ("GRADWATCH_RUN", "GRADWATCH_JOB_UID", "JOBSET_UID", "JOB_UID", "TORCHELASTIC_RUN_ID"):
        value = env.get(variable, "").strip()
        if value and not (variable == "TORCHELASTIC_RUN_ID" and value.lower() == "none"):
            return safe_id(value), variable, ""
    if env.get("SLURM_JOB_ID", "").strip():
        return safe_id(_slurm_id(env)), "SLURM_JOB_ID", ""
    if place.world_size == 1:
        return new_id(model_name), "new", ""
    warning = ""
    if place.local_world_size < place.world_size:
        warning = (
            f"{place.world_size} ranks on several nodes share no run id; each node records a run of its own. "
            "Set GRADWATCH_RUN to the same value on all of them"
        )
    launcher = _launcher(env)
    if launcher is None:
        if not warning:
            warning = "the ranks share no run id; set GRADWATCH_RUN to the same value on all of them"
        return new_id(model_name), "new", warning
    started, fingerprint = launcher
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(started))
    return f"{slug(model_name)}-{stamp}-{fingerprint}", "launcher", warning


def _slurm_id(env: Mapping[str, str]) -> str:
    parts = ["slurm", env.get("SLURM_CLUSTER_NAME", "").strip()]
    array = env.get("SLURM_ARRAY_JOB_ID", "").strip()
    if array:
        parts += [array, env.get("SLURM_ARRAY_TASK_ID", "").strip()]
    else:
        parts.append(env["SLURM_JOB_ID"].strip())
    if env.get("SLURM_HET_SIZE", "") and env.get("SLURM_HET_JOB_ID", "").strip():
        parts[2:] = [env["SLURM_HET_JOB_ID"].strip()]
    # Each srun of a batch job is a training of its own. A requeued job counts its steps from 0 again.
    if "SLURM_STEP_NUM_TASKS" in env and env.get("SLURM_STEP_ID", "0").isdigit():
        step = env.get("SLURM_STEP_ID", "0")
        parts.append(f"step{step}" if step != "0" else "")
    return "-".join(part for part in parts if part)


def _launcher(env: Mapping[str, str]) -> tuple[float, str] | None:
    """When the launcher started and a fingerprint of it, or None where there is none: the parent process,
    or who ``GRADWATCH_LAUNCHER_PID`` says (where one rank starts the others, it is not their parent's child)."""
    parent = _integer(env, "GRADWATCH_LAUNCHER_PID") or os.getppid()
    if parent <= 1:  # an init is the parent of everything that lost its own
        return None
    try:
        ticks = int(Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
    # The kernel's boot time and the ticks since do not move when the clock is set, so all ranks see one stamp.
    fingerprint = hashlib.sha256(f"{boot_id()} {parent} {ticks}".encode()).hexdigest()[:10]
    return _boot_time() + ticks / os.sysconf("SC_CLK_TCK"), fingerprint


def _boot_time() -> float:
    try:
        match = re.search(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.M)
        return float(match[1]) if match else 0.0
    except OSError:
        return 0.0


# -- the attempt


def _attempt(env: Mapping[str, str], root: Path | None, run: str, rank: int) -> tuple[int, str]:
    """The attempt, and what told it.

    Restarts add up: those of a JobSet or a Slurm job, and torchrun's within
    one of them. Where the journal holds that attempt already, a restart went
    uncounted (a container's, a second launch by hand), and it is the next one.
    """
    told = [
        (value, name)
        for name in ("JOBSET_RESTART_ATTEMPT", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
        if (value := _integer(env, name)) is not None
    ]
    attempt = sum(value for value, _ in told)
    on_disk = _next_on_disk(root, run, rank)
    if on_disk > attempt:
        return on_disk, "journal"
    return attempt, "+".join(name for _, name in told) or "first"


def _next_on_disk(root: Path | None, run: str, rank: int) -> int:
    """One more than the highest attempt of this run and rank below ``root``; 0 where there is none."""
    if root is None:
        return 0
    try:
        names = os.listdir(root / run / f"rank-{rank}")  # noqa: PTH208 (names are all that is wanted)
    except OSError:
        return 0
    numbers = [int(match[1]) for name in names if (match := re.fullmatch(r"attempt-(\d{1,9})", name))]
    return max(numbers, default=-1) + 1


# -- the place


def _place(env: Mapping[str, str]) -> Identity:
    """Rank and world: an initialised process group's, else torchrun's, else srun's, else mpirun's."""
    group = _process_group()
    # srun sets SLURM_STEP_NUM_TASKS; a batch script has SLURM_PROCID too, but one process only.
    slurm = "SLURM_STEP_NUM_TASKS" in env
    rank = _first(env, "RANK", "SLURM_PROCID" if slurm else "", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    world = _first(env, "WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    local = _first(env, "LOCAL_RANK", "SLURM_LOCALID" if slurm else "", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")
    local_world = _first(env, "LOCAL_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS")
    if group is not None:
        rank, world = group
    rank = rank or 0
    world = max(world or 1, rank + 1)
    if local_world is None and slurm:
        local_world = _slurm_local_world(env)
    known = local is not None or world == 1
    local = local if local is not None else rank
    local_world = min(world, max(local_world or (world if "GROUP_RANK" not in env else 1), local + 1))
    return Identity(
        run="",
        run_name="",
        rank=rank,
        local_rank=local,
        world_size=world,
        local_world_size=local_world,
        host=env.get("NODE_NAME") or env.get("SLURMD_NODENAME") or socket.gethostname(),
        boot_id=boot_id(),
        local_rank_known=known,
    )


def _process_group() -> tuple[int, int] | None:
    """Rank and world size of an initialised default process group; local look-ups, no collective."""
    distributed: Any = sys.modules.get("torch.distributed")
    try:
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return int(distributed.get_rank()), int(distributed.get_world_size())
    except Exception:
        pass
    return None


def _slurm_local_world(env: Mapping[str, str]) -> int | None:
    """Tasks on this node from ``SLURM_STEP_TASKS_PER_NODE``, like ``4(x2),1``."""
    nodes: list[int] = []
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", env.get("SLURM_STEP_TASKS_PER_NODE", "")):
        nodes += [int(count)] * min(int(times or 1), 100_000)
    node = _integer(env, "SLURM_NODEID") or 0
    return nodes[node] if node < len(nodes) else None


def boot_id() -> str:
    """The kernel's boot id, or "" where there is none to read; differs after a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _integer(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "").strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def _first(env: Mapping[str, str], *names: str) -> int | None:
    return next((value for name in names if name and (value := _integer(env, name)) is not None), None)
