"""Where a run comes from: code, seed, interpreter, machine, device. Nothing here waits for long or raises."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

#: Longest wait for git to say whether files were changed.
GIT_SECONDS: Final = 0.04
_COMMIT: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_COMMIT_VARIABLES: Final = ("GRADWATCH_COMMIT", "GIT_COMMIT", "GITHUB_SHA", "CI_COMMIT_SHA")


def machine() -> dict[str, Any]:
    """Interpreter, libraries, operating system."""
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()}-{platform.release()}-{platform.machine()}",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or torch.version.hip,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def device(parameters: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Kind, count and name of the devices that hold the parameters; one that is not in use is not woken."""
    kinds = {str(parameter.device.type) for parameter in parameters}
    kind = next((k for k in sorted(kinds) if k not in ("cpu", "meta")), min(kinds, default="cpu"))
    facts: dict[str, Any] = {"type": kind, "name": kind}
    module: Any = getattr(torch, kind, None)
    if kind in ("cuda", "xpu") and module is not None and module.is_initialized():
        facts |= {"name": module.get_device_name(), "count": module.device_count()}
    elif kind == "cpu":
        facts["name"] = _processor() or kind
    return facts


def seed() -> int:
    """The seed of torch's default CPU generator; no device is asked."""
    return int(torch.initial_seed())


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith(("model name", "Model")):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


# -- git


def git(start: Path | None = None, env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """``{"commit", "branch", "dirty"}`` of the code that runs, each None where it is not known.

    The commit is read from ``.git`` above the script (else above the working
    directory), or from the environment of an image without one
    (``GRADWATCH_COMMIT``, ``GIT_COMMIT``, ``GITHUB_SHA``, ``CI_COMMIT_SHA``).
    ``dirty`` says whether tracked files were changed; git gets 40 ms for it.
    """
    env = os.environ if env is None else env
    facts: dict[str, Any] = {"commit": None, "branch": None, "dirty": None}
    try:
        for place in [start] if start is not None else _code_places():
            directory = _git_directory(place)
            if directory is not None:
                facts["commit"], facts["branch"] = _head(directory)
                facts["dirty"] = _dirty(place) if facts["commit"] else None
                break
    except (OSError, ValueError):
        pass
    if facts["commit"] is None:
        facts["commit"] = next((env[name] for name in _COMMIT_VARIABLES if _COMMIT.fullmatch(env.get(name, ""))), None)
    return facts


def _code_places() -> list[Path]:
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    places = [Path(script).resolve().parent] if script and "site-packages" not in script else []
    return [*places, Path.cwd()]


def _git_directory(place: Path) -> Path | None:
    for folder in [place, *place.parents][:40]:
        candidate = folder / ".git"
        if candidate.is_dir():
            return candidate
        if candidate.is_file():  # a worktree or a submodule
            pointer = candidate.read_text(encoding="utf-8", errors="replace")[:4096].partition("gitdir:")[2].strip()
            return (folder / pointer).resolve() if pointer else None
    return None


def _head(directory: Path) -> tuple[str | None, str | None]:
    head = (directory / "HEAD").read_text(encoding="utf-8", errors="replace")[:4096].strip()
    if not head.startswith("ref:"):
        return (head if _COMMIT.fullmatch(head) else None), None
    reference = head.removeprefix("ref:").strip()
    branch = reference.removeprefix("refs/heads/")
    if ".." in reference or reference.startswith("/"):
        return None, None
    common = directory / "commondir"
    shared = (directory / common.read_text().strip()).resolve() if common.is_file() else directory
    for base in (directory, shared):
        loose = base / reference
        if loose.is_file():
            commit = loose.read_text(encoding="utf-8", errors="replace")[:200].strip()
            return (commit if _COMMIT.fullmatch(commit) else None), branch
    packed = shared / "packed-refs"
    if packed.is_file() and packed.stat().st_size < 16 * 2**20:
        text = packed.read_text(encoding="utf-8", errors="replace")
        match = re.search(rf"^([0-9a-f]{{40,64}}) {re.escape(reference)}$", text, re.M)
        return (match[1] if match else None), branch
    return None, branch


def _dirty(place: Path) -> bool | None:
    """Ask git, for a bounded time, without locks, hooks or a file system monitor."""
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(place)]
    command += ["status", "--porcelain", "--untracked-files=no", "--ignore-submodules"]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return bool(done.stdout.strip()) if done.returncode == 0 else None
