"""A pod as the kubelet makes one, of namespaces alone: what its containers see of each other, and what they may do.

A process that sleeps holds the pod's mount namespace, with a `tmpfs` for each volume, of the group that is the pod's
`fsGroup`. A container is a process in that namespace with mounts of its own (a volume may be read-only), a PID
namespace in which it is number 1, and a user without any capability. Containers share the network with this machine.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.ops.cluster_support.rendering import ROOT
from tests.services import eventually

#: Below this, the pod's volumes.
PLACE = Path("/mnt")


def refusal() -> str | None:
    """Why no pod can be made here; None where one can."""
    if os.geteuid() != 0:
        return "needs root"
    done = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "mount", "-t", "tmpfs", "none", PLACE],
        capture_output=True, text=True, timeout=30,
    )  # fmt: skip
    return None if done.returncode == 0 else f"this sandbox has no namespaces: {done.stderr.strip()}"


class Container:
    """A process that is number 1 of its PID namespace."""

    def __init__(self, handle: subprocess.Popen[str]) -> None:
        self._handle = handle
        assert handle.stdout is not None
        self.output = handle.stdout

    @property
    def pid(self) -> int:
        """Its number as the kubelet sees it."""
        children = Path(f"/proc/{self._handle.pid}/task/{self._handle.pid}/children")
        return int(eventually(lambda: children.read_text().split(), "the container runs")[0])

    @property
    def running(self) -> bool:
        return self._handle.poll() is None

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit status; of one that a signal ended, `unshare` tells no more than that it is not 0."""
        return self._handle.wait(seconds)

    def stop(self, grace: float) -> int:
        """As the kubelet does: SIGTERM, and SIGKILL after the grace period."""
        self.send(signal.SIGTERM)
        try:
            return self.wait(grace)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            return self.wait(10)

    def remove(self) -> None:
        if self.running:
            self._handle.kill()  # `--kill-child`: what is in the container goes with it
            self._handle.wait(10)
        self.output.close()


class Pod:
    """Volumes by name and size in MiB, and the containers that mount them."""

    def __init__(self, directory: Path, group: int, volumes: Mapping[str, int]) -> None:
        self.directory, self.group = directory, group
        self.containers: list[Container] = []
        lines = [*_open(directory), f"mount -t tmpfs -o mode=755 none {PLACE}"]
        for name, size in volumes.items():
            options = f"mode=2777,gid={group},size={size}m"
            lines += [f"mkdir {PLACE}/{name}", f"mount -t tmpfs -o {options} {name} {PLACE}/{name}"]
        script = " && ".join([*lines, "echo ready && exec sleep infinity"])
        self._pause = subprocess.Popen(
            ["unshare", "--mount", "--propagation=private", "sh", "-ec", script],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert self._pause.stdout is not None
        assert self._pause.stderr is not None
        if self._pause.stdout.readline() != "ready\n":
            raise RuntimeError(f"no pod: {self._pause.stderr.read()}")

    def seen(self, volume: str) -> Path:
        """A volume as this test reaches it, through the process that holds the pod's mounts."""
        return Path(f"/proc/{self._pause.pid}/root{PLACE}/{volume}")

    def start(
        self,
        command: Sequence[str],
        log: Path,
        user: int,
        environment: Mapping[str, str],
        read_only: Sequence[str] = (),
    ) -> Container:
        """A container of this user and the pod's group; volumes named in ``read_only`` are mounted so."""
        mounts = [
            f"mount --bind {PLACE}/{name} {PLACE}/{name} && mount -o remount,bind,ro {PLACE}/{name}"
            for name in read_only
        ]
        become = (
            f"setpriv --reuid={user} --regid={user} --groups={self.group} --bounding-set=-all --inh-caps=-all "
            f"--no-new-privs {shlex.join(command)}"
        )
        with log.open("a") as output:
            handle = subprocess.Popen(
                [
                    "nsenter", f"--mount=/proc/{self._pause.pid}/ns/mnt", "--wd=/",
                    "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc",
                    "sh", "-ec", " && ".join([*mounts, f"exec {become}"]),
                ],
                env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "agent"), **environment},
                stdout=subprocess.PIPE, stderr=output, text=True, start_new_session=True,
            )  # fmt: skip
        self.containers.append(Container(handle))
        return self.containers[-1]

    def remove(self) -> None:
        for container in self.containers:
            container.remove()
        self._pause.kill()
        self._pause.communicate(timeout=10)


def _open(directory: Path) -> list[str]:
    """Lines that let everybody reach this Python and these sources, also below a directory that is closed to others.

    Such a directory is covered, in the pod alone, by one that holds nothing but them.
    """
    needed = {Path(sys.base_prefix), Path(sys.prefix), ROOT}
    closed: dict[Path, list[Path]] = {}
    for path in sorted(needed):
        for parent in reversed(path.parents):
            if not parent.stat().st_mode & 0o001:
                closed.setdefault(parent, []).append(path)
                break
    lines = []
    for number, (parent, inside) in enumerate(closed.items()):
        aside = [directory / f"aside-{number}-{index}" for index, _ in enumerate(inside)]
        for path, kept in zip(inside, aside, strict=True):
            lines += [f"mkdir {kept}", f"mount --rbind {path} {kept}"]
        lines.append(f"mount -t tmpfs -o mode=755 none {parent}")
        for path, kept in zip(inside, aside, strict=True):
            lines += [f"mkdir -p {path}", f"mount --rbind {kept} {path}"]
    return lines
