"""The Dockerfiles: small, without torch, as an ordinary user. Their steps run in a bare venv, without Docker."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.ops.cluster_support.rendering import ROOT

FILES = {path.name.partition(".")[0]: path for path in (ROOT / "docker").glob("*.Dockerfile")}
EVERY = pytest.mark.parametrize("name", sorted(FILES))
#: Bytes that an image may have beyond Python's own.
LIMIT = 250 * 10**6


def instructions(path: Path) -> Iterator[tuple[str, str]]:
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    text = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    for line in text.splitlines():
        word, _, rest = line.partition(" ")
        yield word, rest.strip()


def hadolint(path: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "hadolint"
    return subprocess.run(
        [program, "--no-color", "--failure-threshold", "style", path], capture_output=True, text=True, timeout=60
    )


def test_there_is_a_file_for_each_image() -> None:
    assert set(FILES) == {"agent", "bridge", "demo", "mlflow"}


@EVERY
def test_hadolint_has_nothing_to_say(name: str) -> None:
    done = hadolint(FILES[name])
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_is_at_work(tmp_path: Path) -> None:
    bad = tmp_path / "bad.Dockerfile"
    bad.write_text("FROM python:latest\nWORKDIR app\nRUN pip install torch\nUSER root\n")
    done = hadolint(bad)
    assert done.returncode != 0
    assert {"DL3000", "DL3002", "DL3007", "DL3013", "DL3042"} <= set(re.findall(r"DL\d{4}", done.stdout))


@EVERY
def test_the_image_runs_as_the_manifests_say(name: str) -> None:
    said = dict(instructions(FILES[name]))
    assert said["USER"] == "10001:10001"
    entry = {"agent": '["gradwatch", "agent"]', "bridge": '["gradwatch", "bridge"]', "mlflow": '["mlflow"]'}
    entry["demo"] = '["python", "-m", "gradwatch.demo.train"]'
    assert said["ENTRYPOINT"] == entry[name]


def test_mlflow_is_the_version_that_is_tested_against() -> None:
    pins = set((ROOT / "constraints.txt").read_text().splitlines())
    named = set(re.findall(r"(?:mlflow|psycopg2-binary)==\S+", FILES["mlflow"].read_text()))
    assert len(named) == 2
    assert named <= pins


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image's venv, by the steps of the Dockerfile, on a copy of what its COPY lines name."""
    directory = tmp_path_factory.mktemp("image")
    source, venv = directory / "src", directory / "venv"
    source.mkdir()
    files = subprocess.run(
        ["git", "ls-files", "pyproject.toml", "README.md", "LICENSE", "constraints.txt", "agent"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    for file in files:
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    [step] = [rest for word, rest in instructions(FILES["agent"]) if word == "RUN"]
    step = re.sub(r"\bpython -m", f"{sys.executable} -m", step).replace("/opt/gradwatch", str(venv))
    done = subprocess.run(["bash", "-ec", step], cwd=source, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return venv


def test_agent_and_bridge_have_the_same_install_step() -> None:
    agent, bridge = (
        [r for w, r in instructions(FILES[n]) if w in ("RUN", "COPY", "FROM")] for n in ("agent", "bridge")
    )
    assert agent == bridge


def test_what_is_installed_is_small_and_has_no_torch(installed: Path) -> None:
    size = sum(path.stat().st_size for path in installed.rglob("*") if path.is_file() and not path.is_symlink())
    assert 20 * 10**6 < size <= LIMIT
    packages = {path.name.lower() for path in installed.glob("lib/python3*/site-packages/*")}
    assert "gradwatch" in packages
    assert not {"torch", "pip", "setuptools", "tests"} & packages


@pytest.mark.parametrize("command", ["agent", "bridge"])
def test_the_commands_start_there(installed: Path, command: str) -> None:
    run = [installed / "bin/gradwatch", command]
    done = subprocess.run([*run, "--help"], capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, done.stderr
    assert "--listen" in done.stdout
